"""Counting experts: against brute force, with compilation and recomputation, over processes, and in every sink."""

from __future__ import annotations

import json
from pathlib import Path

import count_experts
import numpy as np
import pytest
import torch
import warm_processes
from processes import run_in_processes
from wandb_files import wandb_history

from titan_peer import train
from titan_peer.common.units import count_text
from titan_peer.config.job import ActivationCheckpoint
from titan_peer.config.parse import load_config
from titan_peer.distributed.parallelize import apply_activation_checkpointing, apply_compile
from titan_peer.experts.plots import load_text
from titan_peer.experts.report import remedies
from titan_peer.experts.usage import DEAD_AFTER, LOAD_EDGES, PERCENTILES, Counts, ExpertUsage, layer_usage
from titan_peer.model import ModelArgs, PEERArgs, Transformer

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false"]
TINY += ["--training.seq_len", "64", "--training.local_batch_size", "2", "--model.n_layers", "2"]
TINY += ["--training.steps", "4", "--metrics.log_expert_usage", "--checkpoint.enable", "false"]


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (1, ["--training.global_batch_size", "4"]),
        pytest.param(1, ["--activation_checkpoint.mode", "full"], marks=pytest.mark.slow),
        (2, ["--parallelism.expert_parallel_degree", "2"]),
        pytest.param(2, ["--model.peer.share_experts", "true"], marks=pytest.mark.slow),
    ],
    ids=["accumulated", "recomputed", "expert-parallel", "shared-tables"],
)
def test_counts_equal_a_brute_force_recount(processes: int, arguments: list[str], tmp_path: Path) -> None:
    words = [str(tmp_path), *TINY, *arguments]
    words += ["--job.dump_folder", str(tmp_path), "--validation.freq", "2", "--validation.steps", "1"]
    if processes == 1:  # without a group
        done = warm_processes.run("count_experts", *words)
        assert done.returncode == 0, done.stderr
    else:
        run_in_processes(processes, count_experts.main, words)
    counted = np.load(tmp_path / "counted.npz")
    recounts = [np.load(tmp_path / f"recount-{rank}.npz") for rank in range(processes)]
    assert len(counted.files) == 4
    for name in counted.files:
        expected = sum(recount[name] for recount in recounts)
        if name.startswith("counts"):
            assert expected.sum() > 0
            np.testing.assert_array_equal(counted[name], expected)
        else:
            np.testing.assert_allclose(counted[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "selective_op"))]
)
def test_compiled_blocks_count_every_pair_once(mode: str) -> None:
    torch.manual_seed(0)
    peer = PEERArgs(num_experts=256, product_key_dim=[16, 16], num_heads=2, num_experts_per_tok=4, query_dim=16)
    args = ModelArgs(vocab_size=128, dim=32, n_layers=2, n_dense_layers=0, max_seq_len=32, peer=peer)
    model = Transformer(args)
    model.init_weights()
    apply_activation_checkpointing(model, ActivationCheckpoint(mode=mode), compiled=True)  # type: ignore[arg-type]
    apply_compile(model)
    model.compile_loss = False
    usage = ExpertUsage(model)
    tokens = torch.randint(0, 128, (3, 32))
    for _ in range(2):
        model(tokens, None, tokens).backward()
    window = usage.read()
    with torch.no_grad():
        model.eval()(tokens)
    for layer in (0, 1):
        assert window[layer].counts.sum(1).tolist() == [2 * 3 * 32 * 4] * 2
        assert window[layer].gate_sums.sum(1).tolist() == pytest.approx([2 * 3 * 32] * 2, rel=1e-5)
        assert usage.read()[layer].counts.sum() == 0  # evaluation is not counted, and reading clears the counters


def test_statistics_equal_their_definitions() -> None:
    random = np.random.default_rng(0)
    gates = random.gamma(0.3, size=(3, 500)).astype(np.float32)
    gates[:, :100] = 0
    counts = np.where(gates > 0, random.integers(1, 9, gates.shape), 0)
    idle = np.where(counts.sum(0) > 0, 0.0, DEAD_AFTER).astype(np.float32)
    window = Counts(torch.tensor(counts), torch.tensor(gates), torch.tensor(idle))
    usage = layer_usage(7, window)

    def definitions(used, weights):
        p = weights.astype(np.float64) / weights.sum(dtype=np.float64)
        divergence = sum(q * np.log(q * len(p)) for q in p if q > 0)
        gini = np.abs(p[:, None] - p[None]).sum() / (2 * len(p) ** 2 * p.mean())
        return np.mean(used > 0), divergence, gini, p * len(p)

    for spread, used, weights in [
        (usage.whole, counts.sum(0), gates.sum(0)),
        *((usage.heads[h], counts[h], gates[h]) for h in range(3)),
    ]:
        share, divergence, gini, _ = definitions(used, weights)
        assert spread.share_used == pytest.approx(share)
        assert spread.unevenness == pytest.approx(divergence, rel=1e-5)
        assert spread.gini == pytest.approx(gini, rel=1e-5)
    loads = definitions(counts.sum(0), gates.sum(0))[3]
    assert usage.dead == 100
    assert usage.expected == pytest.approx(counts.sum() / 500)
    assert [hot.expert for hot in usage.hot] == np.argsort(-loads)[:10].tolist()
    assert usage.hot[0].load == pytest.approx(loads.max(), rel=1e-5)
    assert list(usage.histogram.counts) == np.histogram(loads, np.array(LOAD_EDGES))[0].tolist()
    nearest = np.percentile(loads, PERCENTILES, method="nearest")
    assert usage.percentiles == pytest.approx(nearest.tolist(), rel=1e-5, abs=1e-9)
    descending = -np.sort(-loads)
    assert usage.loads_at_ranks == pytest.approx([descending[r - 1] for r in usage.ranks], rel=1e-5, abs=1e-9)
    assert usage.ranks[0] == 1 and usage.ranks[-1] == 500
    assert usage.scalars()["expert_usage/layer_7/head_2/gini"] == usage.heads[2].gini


def test_an_expert_is_dead_only_after_uniform_usage_would_have_used_it_ten_times() -> None:
    peer = PEERArgs(num_experts=64, product_key_dim=[8, 8], num_heads=1, num_experts_per_tok=4, query_dim=16)
    model = Transformer(ModelArgs(vocab_size=32, dim=16, n_layers=1, n_dense_layers=0, max_seq_len=64, peer=peer))
    model.init_weights()
    usage = ExpertUsage(model)
    tokens = torch.randint(0, 32, (1, 64))
    seen = set()
    for window in range(1, 4):
        model(tokens)
        counts = usage.read()[0]
        seen |= set(counts.counts.sum(0).nonzero().flatten().tolist())
        # 64 tokens x 4 experts over 64 experts: 4 uses per window
        assert counts.expected == 4.0
        dead = layer_usage(0, counts).dead
        assert dead == (64 - len(seen) if 4 * window >= DEAD_AFTER else 0)
    assert dead > 0


def test_a_run_reports_histograms_and_plots_to_every_sink(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [
        *TINY,
        "--job.dump_folder",
        tmp_path,
        "--metrics.expert_usage_freq",
        "2",
        "--validation.enable",
        "false",
    ]
    arguments += ["--metrics.enable_tensorboard", "--metrics.enable_wandb", "--metrics.wandb_mode", "offline"]
    done = warm_processes.run(warm_processes.TRAIN, *arguments, WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    assert "% of experts used, unevenness" in done.stderr

    name = "expert_usage/layer_1/load"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    histograms = [line for line in lines if line.get("histogram") == name]
    assert [line["step"] for line in histograms] == [2, 4]
    assert sum(histograms[-1]["counts"]) == 16384
    scalars = [line for line in lines if "expert_usage/layer_1/unevenness" in line]
    assert scalars[0]["expert_usage/layer_1/head_3/share_used"] > 0

    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    board.Reload()
    events = board.Histograms(name)
    assert [event.step for event in events] == [2, 4]
    assert sum(events[-1].histogram_value.bucket) == 16384
    assert board.Scalars("expert_usage/layer_0/gini")[-1].value > 0
    assert {"expert_usage/rank_frequency", "expert_usage/load_percentiles", "expert_usage/over_time"} <= set(
        board.Tags()["images"]
    )
    assert "debug_model" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()

    history = wandb_history(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
    of_steps = {row["step"]: row[name] for row in history if name in row}
    assert sorted(of_steps) == [2, 4]
    assert of_steps[4]["_type"] == "histogram" and of_steps[4]["values"] == histograms[-1]["counts"]
    assert any(row.get("expert_usage/rank_frequency", {}).get("_type") == "image-file" for row in history)
    for plot in ("rank_frequency", "load_percentiles", "over_time"):
        assert (tmp_path / "expert_usage" / f"{plot}.png").stat().st_size > 10_000


def test_warnings_advise_nothing_that_the_job_does_already() -> None:
    debug = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml")]
    assert remedies(load_config(debug)) == {
        "hot": "try training.expert_balance_coeff = 0.01 or a lower optimizer.lr than 0.006",
        "dead": "try training.reinit_dead_experts_freq = 10 or training.expert_balance_coeff = 0.01 "
        "or a lower optimizer.lr than 0.006",
    }
    given = ["--model.peer.query_norm", "rms", "--training.reinit_dead_experts_freq", "20"]
    assert remedies(load_config([*debug, *given, "--training.expert_balance_coeff", "0.02"])) == dict.fromkeys(
        ("hot", "dead"),
        'try a larger training.expert_balance_coeff than 0.02 or model.peer.query_norm = "batch" '
        "or a lower optimizer.lr than 0.006",
    )


@pytest.mark.parametrize(
    ("load", "text"),
    [(0.0, "0"), (4e-5, "<0.001"), (0.022, "0.022"), (1.84, "1.8"), (74.2, "74"), (968.4, "968"), (12345.6, "12,346")],
)
def test_loads_are_written_without_powers_of_ten(load: float, text: str) -> None:
    assert load_text(load) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1 K"),
        (999_960, "1 M"),
        (28_398_528, "28.4 M"),
        (1e13, "10 T"),
        (2e15, "2,000 T"),
    ],
)
def test_counts_are_written_without_powers_of_ten(count: float, text: str) -> None:
    assert count_text(count) == text


def test_a_folder_that_cannot_be_made_is_named_before_training(tmp_path, capsys):
    (tmp_path / "expert_usage").touch()
    assert train.main([*TINY, "--job.dump_folder", str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'expert_usage'}: cannot be made" in capsys.readouterr().err
