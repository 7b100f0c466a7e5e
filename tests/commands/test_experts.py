"""`titan-peer experts`: the report of a saved model equals a brute-force recount and names the right tokens."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_processes

from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.commands import experts
from titan_peer.common.errors import UserError
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.experts import measure
from titan_peer.model import peer_layers

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "assets/sample_text/validation.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the debug model with one block, after two steps."""
    folder = tmp_path_factory.mktemp("job")
    arguments = ["--job.config_file", "train_configs/debug_model.toml", "--job.dump_folder", str(folder)]
    arguments += ["--compile.enable", "false", "--training.steps", "2", "--model.n_layers", "1", "--model.dim", "64"]
    arguments += ["--model.peer.num_experts", "1024", "--model.peer.product_key_dim", "32", "32"]
    arguments += ["--training.seq_len", "64", "--validation.enable", "false"]
    done = warm_processes.run(warm_processes.TRAIN, *arguments)
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint" / "step-2"


def texts_of(tokenizer: Tokenizer, ids: list[int], place: int) -> list[str]:
    """The texts that may be shown for a token: its own text or, if it ends a character, the whole character."""
    alone = tokenizer.decode([ids[place]])
    texts = [alone]
    if "\ufffd" in alone:
        upto = [tokenizer.decode(ids[place - back : place + 1]) for back in range(1, min(4, place + 1))]
        texts += [text[-1] for text in upto if text and "\ufffd" not in text]
    return [json.dumps(text, ensure_ascii=False)[1:-1] for text in texts]


def test_the_report_equals_a_brute_force_recount(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--data", TEXT, "--tokens", "1500", "--output-dir", str(tmp_path)]
    assert experts.main([*arguments, "--device", "cpu", "--num-experts", "3", "--num-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "expert_usage.jsonl").read_text(encoding="utf-8"))

    model, job, tokenizer = load_model_for_inference(checkpoint)
    ((layer, peer),) = peer_layers(model)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = peer.retrieve

    def retrieve(x: torch.Tensor, is_token: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        indices, scores = original(x, is_token)
        found.append((indices, scores.softmax(-1)))
        return indices, scores

    peer.retrieve = retrieve  # type: ignore[method-assign]
    work = measure.batches(measure.read_documents([TEXT], tokenizer), job.training.seq_len, 1, 1500)
    with torch.no_grad():
        for tokens, documents in work:
            model(tokens, documents)
    indices, gates = (torch.cat(parts).numpy() for parts in zip(*found))  # [1500, H, k]
    assert len(indices) == 1500
    usage = np.zeros(1024)
    np.add.at(usage, indices.flatten(), gates.flatten())
    loads = usage / usage.sum() * 1024
    assert report["step"] == 2 and report["layer"] == layer
    assert [hot["expert"] for hot in report["hot"]] == np.argsort(-loads)[:10].tolist()
    assert report["whole"]["share_used"] == pytest.approx((usage > 0).mean())
    assert [hot["load"] for hot in report["hot"]] == pytest.approx(np.sort(loads)[::-1][:10].tolist(), rel=1e-4)

    flat = torch.cat([tokens.flatten() for tokens, _ in work]).tolist()
    text = (tmp_path / "tokens.txt").read_text(encoding="utf-8")
    assert text in shown
    blocks = text.strip().split("\n\n")
    assert len(blocks) == 3
    for block, hot in zip(blocks, report["hot"]):
        heading, *lines = block.splitlines()
        expert = hot["expert"]
        assert heading.startswith(f"layer 0, expert {expert}: ")
        best = sorted(((gates[t][indices[t] == expert].max(initial=-1), t) for t in range(1500)), reverse=True)[:4]
        assert [float(line.split()[0]) for line in lines] == pytest.approx([gate for gate, _ in best], abs=1e-3)
        for line, (_, token) in zip(lines, best):
            assert any(f"[{text}]" in line for text in texts_of(tokenizer, flat, token)), line
    for plot in ("rank_frequency", "load_percentiles"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 10_000


def test_as_many_of_the_hottest_experts_are_shown_as_were_asked_for(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "titan_peer")
    few = tmp_path / "few.txt"
    few.write_text("In the beginning was the Word, and the Word was with God.", encoding="utf-8")
    arguments = ["--checkpoint", str(checkpoint), "--data", str(few), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert experts.main([*arguments, "--num_experts", "12"]) == 0
    blocks = (tmp_path / "tokens.txt").read_text(encoding="utf-8").strip().split("\n\n")
    assert len(blocks) == 12
    assert "--tokens 100,000 were asked for" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "1024"], "--experts 1024: the layers have experts 0 to 1,023"),
        (["--seq-len", "99999"], "--seq_len 99999: must be from 1 to model.max_seq_len = 1024"),
        (["--seq_len", "0"], "--seq_len 0: must be from 1 to model.max_seq_len = 1024"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--data", "no/such.txt"], "no/such.txt"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    defaults = ["--checkpoint", str(checkpoint), "--data", TEXT, "--output-dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(UserError) as error:
        experts.main([*defaults, *arguments])
    assert message in str(error.value)


def test_too_little_text_to_tell_which_experts_are_dead_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--data", TEXT, "--device", "cpu", "--output_dir", str(tmp_path)]
    for tokens, is_told in (("100", False), ("20000", True)):
        assert experts.main([*arguments, "--tokens", tokens]) == 0
        shown = capsys.readouterr().out
        expected = float(re.search(r"tokens, ([\d.]+) uses of an expert", shown)[1])  # type: ignore[index]
        assert (expected >= 10) == is_told
        row = next(line for line in shown.splitlines() if re.match(r" +\d+ +[\d.]+%", line))
        assert (row.split()[4] != "?") == is_told
        assert ("dead ?: too little text to tell" in shown) != is_told
