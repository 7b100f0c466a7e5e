"""The remedies for uneven usage work as documented: the loss is the reported unevenness, and revival copies the right
rows."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.experts.balance import add_balance_loss, unevenness
from titan_peer.experts.revival import counterparts, find_dead_keys
from titan_peer.experts.usage import DEAD_AFTER
from titan_peer.model import PEER, ModelArgs, PEERArgs, Transformer, peer_layers
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def dense_unevenness(indices: Tensor, gates: Tensor, num_experts: int) -> Tensor:
    usage = torch.zeros(num_experts, dtype=gates.dtype).index_put(
        (indices.flatten(),), gates.flatten(), accumulate=True
    )
    p = usage / usage.sum()
    p = p[p > 0]
    return math.log(num_experts) + (p * p.log()).sum()


def test_the_loss_is_the_unevenness_and_its_gradient_is_right() -> None:
    torch.manual_seed(0)
    indices = torch.randint(0, 30, (16, 2, 3))
    gates = torch.rand(16, 2, 3, dtype=torch.float64, requires_grad=True)
    assert unevenness(indices, gates, 50).item() == pytest.approx(
        dense_unevenness(indices, gates, 50).item(), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda g: unevenness(indices, g, 50), (gates,))


@pytest.mark.parametrize("gates_of", [torch.relu, torch.sigmoid], ids=["relu", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_gates_that_are_all_zero_have_no_gradient(gates_of: Callable[[Tensor], Tensor], padded: bool) -> None:
    scores = torch.full((4, 2, 8), -300.0, requires_grad=True)
    indices = torch.full((4, 2, 8), -1) if padded else torch.randint(64, (4, 2, 8))
    gates = gates_of(scores)
    assert not gates.any()
    gates.retain_grad()
    loss = unevenness(indices, gates, 64)
    assert loss.item() == pytest.approx(math.log(64))
    (1e3 * loss).backward()
    assert gates.grad is not None and scores.grad is not None
    assert not gates.grad.any() and not scores.grad.any()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_minimises_loss_plus_coeff_times_unevenness(compiled: bool) -> None:
    peer = PEERArgs(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16)
    args = ModelArgs(vocab_size=64, dim=32, n_layers=2, n_dense_layers=0, max_seq_len=32, peer=peer)
    torch.manual_seed(0)
    plain, balanced = Transformer(args), Transformer(args)
    plain.init_weights()
    balanced.load_state_dict(plain.state_dict())
    balanced.rope.copy_(plain.rope)
    tokens = torch.randint(0, 64, (3, 32))

    routed: list[tuple[Tensor, Tensor]] = []

    def record(_: PEER, indices: Tensor, gates: Tensor) -> None:
        routed.append((indices, gates))

    for _, layer in peer_layers(plain):
        layer.attach("record", record)
    loss = plain(tokens, None, tokens)
    (loss + 3.0 * sum(dense_unevenness(i, g, 64) for i, g in routed)).backward()

    add_balance_loss(balanced, coeff=12.0, micro_batches=4)
    if compiled:
        for block in balanced.layers:
            block.compile(fullgraph=True)
    same_loss = balanced(tokens, None, tokens)
    same_loss.backward()
    assert same_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, expected), found in zip(plain.named_parameters(), balanced.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_dead_sub_keys_and_their_experts_are_found_as_by_brute_force() -> None:
    shape, heads = [4, 3, 5], 2
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (heads, 60), generator=generator)
    grid = counts.view(heads, *shape)
    grid[0, 2] = 0
    grid[1, :, 1] = 0
    grid[0, :, :, 4] = 0
    grid[0, :, :, 0] = 0
    found = find_dead_keys(counts, shape, heads, generator)
    expected = set()
    for axis, head in itertools.product(range(3), range(heads)):
        for key in range(shape[axis]):
            uses = sum(int(grid[(head, *i)]) for i in itertools.product(*map(range, shape)) if i[axis] == key)
            if uses == 0:
                expected.add((axis, head, key))
    assert {(f.axis, int(h), int(d)) for f in found for h, d in zip(f.key_sets, f.dead)} == expected
    for f in found:
        assert not any((f.axis, int(h), int(s)) in expected for h, s in zip(f.key_sets, f.sources))
        dead, sources = counterparts(f, shape)
        places = [(i, n) for n, i in enumerate(itertools.product(*map(range, shape)))]
        pairs = set()
        for d, s in zip(f.dead.tolist(), f.sources.tolist()):
            number = dict(places)
            pairs |= {(n, number[(*i[: f.axis], s, *i[f.axis + 1 :])]) for i, n in places if i[f.axis] == d}
        assert set(zip(dead.tolist(), sources.tolist())) == pairs
    few = torch.ones(1, 60, dtype=torch.int64)
    few.view(4, 3, 5)[0] = 0
    assert few.sum() / 4 >= DEAD_AFTER and len(find_dead_keys(few, shape, 1, generator)) == 1
    few.view(4, 3, 5)[1:, :, 1:] = 0  # now uniform usage is 9 / 4 per key: too few to call a key dead
    assert not [f for f in find_dead_keys(few, shape, 1, generator) if f.axis == 0]


def test_shared_sub_keys_are_dead_when_no_head_uses_them() -> None:
    counts = torch.full((2, 16), 10)
    counts.view(2, 4, 4)[0, 1] = 0
    generator = torch.Generator().manual_seed(0)
    assert find_dead_keys(counts, [4, 4], 1, generator) == []
    counts.view(2, 4, 4)[1, 1] = 0
    (found,) = find_dead_keys(counts, [4, 4], 1, generator)
    assert (found.axis, found.key_sets.tolist(), found.dead.tolist()) == (0, [0], [1])


SMALL = ["--job.config_file", "train_configs/debug_model.toml", "--compile.enable", "false", "--model.dim", "64"]
SMALL += ["--model.n_layers", "1", "--model.mla.n_heads", "2", "--model.peer.num_experts", "1024"]
SMALL += ["--model.peer.product_key_dim", "32", "32", "--model.peer.num_heads", "2", "--model.peer.query_dim", "32"]
SMALL += ["--training.seq_len", "128", "--training.local_batch_size", "4", "--checkpoint.enable", "false"]
SMALL += ["--validation.enable", "false", "--training.mixed_precision_param", "float32"]


@pytest.mark.slow
def test_revival_is_the_same_on_two_processes_with_sharded_tables(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "titan_peer.distributed.launch", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
            command += ["--rdzv-endpoint", "localhost:0"]
        command += ["tests/distributed/revive_experts.py", str(tmp_path / f"{processes}.pt"), *SMALL]
        command += ["--parallelism.expert_parallel_degree", str(processes), "--job.dump_folder", str(tmp_path)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    one, two = found
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7, msg=name)
    # the experts of sub-key 20, which no head used, are now copies of another sub-key's, with the optimizer state
    keys = one["layers.0.peer.sub_keys.0"]
    tables = {name: t.view(32, 32, -1) for name, t in one.items() if "experts." in name}
    assert len(tables) == 6
    down = tables["layers.0.peer.experts.expert_down"]
    (source,) = [i for i in range(32) if i != 20 and torch.equal(down[i, 9:], down[20, 9:])]
    for table in tables.values():
        assert torch.equal(table[source, 9:], table[20, 9:])
    sources_of_heads = [(keys[head] - keys[head, 20]).norm(dim=1).argsort()[1] for head in range(2)]
    assert source in [int(s) for s in sources_of_heads]


def train(folder: Path, *arguments: str, collapse: bool = False) -> dict[str, float]:
    """The last usage report of a small run. With `collapse`, half of the first axis' sub-keys cannot be chosen at the
    start: all queries have a component in one direction; these sub-keys are opposite to it, the others orthogonal."""
    config = load_config([*SMALL, "--job.dump_folder", str(folder), "--metrics.log_expert_usage", *arguments])
    trainer = Trainer(config, init_world(config.parallelism))
    if collapse:
        for _, peer in peer_layers(trainer.model):
            with torch.no_grad():
                peer.query_norm.bias[:, 0] = 3.0
                peer.sub_keys[0][:, :, 0] = 0.0
                peer.sub_keys[0][:, 16:] = 0.0
                peer.sub_keys[0][:, 16:, 0] = -4.0
    trainer.train()
    lines = (folder / "expert_usage" / "expert_usage.jsonl").read_text(encoding="utf-8").splitlines()
    report: dict[str, float] = json.loads(lines[-1])["whole"]
    return report


def test_the_balance_loss_evens_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = ["--training.steps", "40", "--metrics.expert_usage_freq", "20"]
    plain = train(tmp_path / "plain", *settings)
    balanced = train(tmp_path / "balanced", *settings, "--training.expert_balance_coeff", "0.1")
    assert balanced["unevenness"] < 0.8 * plain["unevenness"]


def test_revival_brings_dead_experts_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = ["--training.steps", "20", "--metrics.expert_usage_freq", "10"]
    collapsed = train(tmp_path / "collapsed", *settings, collapse=True)
    revived = train(tmp_path / "revived", *settings, "--training.reinit_dead_experts_freq", "10", collapse=True)
    assert revived["share_used"] > collapsed["share_used"] + 0.1
    assert revived["unevenness"] < collapsed["unevenness"] - 0.1
