"""A job starts from a checkpoint only if its model and tokenizer are the same, unless a key allows the change."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from titan_peer.checkpoint.compare import changed_function, model_keys, tokenizer_function
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.model import ModelArgs, PEERArgs
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/checkpoint_version_0"
TOKENIZER = GOLDEN / "step-2/tokenizer"
JOB = ["--job.config_file", str(GOLDEN / "small.toml"), "--model.tokenizer_path", str(TOKENIZER)]


@pytest.fixture(autouse=True)
def from_the_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder with a checkpoint of step 2, of a model with untied head, softmax gates, ..."""
    shutil.copytree(GOLDEN / "step-2", tmp_path / "checkpoint/step-2")
    return tmp_path


def trainer(folder: Path, *arguments: object) -> Trainer:
    config = load_config([*JOB, "--job.dump_folder", str(folder), *map(str, arguments)])
    return Trainer(config, init_world(config.parallelism))


def started(folder: Path, *arguments: object) -> Trainer:
    """Another job, which starts from the model of the checkpoint in `folder`."""
    return trainer(folder / "other", "--checkpoint.initial_load_path", folder / "checkpoint/step-2", *arguments)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records if record.name == "titan_peer")


# ---- the model


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.peer.gates", "sigmoid", "model.peer.gates = 'sigmoid' (was 'softmax')"),
        ("model.peer.activation", "relu", "model.peer.activation = 'relu' (was 'gelu')"),
        ("model.peer.num_experts_per_tok", 2, "model.peer.num_experts_per_tok = 2 (was 4)"),
        ("model.peer.norm_keys", "true", "model.peer.norm_keys = True (was False)"),
        ("model.mla.rope_theta", 500000.0, "model.mla.rope_theta = 500000.0 (was 10000.0)"),
        ("model.mla.rope_factor", 4.0, "model.mla.rope_factor = 4.0 (was 1.0)"),
        ("model.norm_eps", 1e-5, "model.norm_eps = 1e-05 (was 1e-06)"),
        ("model.tie_embeddings", "true", "model.tie_embeddings = True (was False)"),
        ("model.peer_layers", 0, "model.peer_layers = [0] (was [1])"),
    ],
)
def test_a_resume_as_another_function_of_the_same_weights_is_refused(folder, key, value, words):
    with pytest.raises(UserError, match="was trained as another model") as refused:
        trainer(folder, f"--{key}", value)
    assert words in str(refused.value) and f"--checkpoint.allow_changed {key}" in str(refused.value)
    with pytest.raises(UserError, match="was trained as another model"):
        started(folder, f"--{key}", value)


def test_what_is_allowed_to_change_changes_and_is_said(folder, caplog):
    caplog.set_level("INFO", logger="titan_peer")
    change = ["--model.peer.gates", "sigmoid", "--model.peer.activation", "relu", "--training.steps", 9]
    job = trainer(folder, *change, "--checkpoint.allow_changed", "model.peer.gates", "model.peer.a*")
    assert job.step == 2 and job.model.layers[1].peer.gates == "sigmoid"
    for words in (
        "model.peer.gates = 'sigmoid' (was 'softmax')", "model.peer.activation = 'relu' (was 'gelu')",
        "training.steps = 9 (was 4)",
    ):  # fmt: skip
        assert words in said(caplog)
    with pytest.raises(UserError, match=r"another model: model.peer.activation = 'relu' \(was 'gelu'\); give"):
        trainer(folder, *change, "--checkpoint.allow_changed", "model.peer.gates")
    with pytest.raises(
        UserError, match=r"allow_changed: 'model.peer.gate' matches nothing; allowed: .*model.peer.gates"
    ):
        trainer(folder, *change, "--checkpoint.allow_changed", "model.peer.gate")


def test_every_key_that_differs_from_the_checkpoint_is_listed_and_no_other(folder, caplog):
    caplog.set_level("INFO", logger="titan_peer")
    trainer(folder, "--optimizer.lr", 0.002, "--data.sources.0.weight", 2.0)
    (line,) = [words for words in said(caplog).splitlines() if "settings that differ" in words]
    changes = {part.split(" = ")[0] for part in line.partition("was saved with: ")[2].split(", ")}
    assert changes == {
        "optimizer.lr", "data.sources[0].weight", "job.config_file", "job.dump_folder", "model.tokenizer_path",
        "optimizer.expert_catch_up",
    }  # fmt: skip
    assert "optimizer.lr = 0.002 (was 0.001)" in line and "data.sources[0].weight = 2.0 (was 1.0)" in line


def test_keys_without_a_part_in_the_function_may_differ(folder):
    settings = ["--model.init_std", 0.1, "--model.max_seq_len", 256, "--model.peer.dropout", 0.1]
    assert trainer(folder, *settings, "--model.mla.original_seq_len", 2048).step == 2  # no effect without YaRN


def test_a_new_key_of_the_model_is_taken_to_change_its_function():
    """All keys are compared, except those that shapes of tensors show or that have no effect; so a new key is
    compared as well."""

    def keys(section: object, prefix: str) -> set[str]:
        fields = {f"{prefix}.{f.name}": getattr(section, f.name) for f in dataclasses.fields(section)}
        nested = {name for name, value in fields.items() if dataclasses.is_dataclass(value)}
        return (fields.keys() - nested).union(*(keys(fields[name], name) for name in nested))

    names = keys(ModelArgs(), "model")
    assert {"model.mla.rope_theta", "model.peer.gates"} < names
    assert names - set(model_keys()) == {
        "model.vocab_size", "model.dim", "model.n_layers", "model.ffn_hidden_dim", "model.mla.q_lora_rank",
        "model.mla.kv_lora_rank", "model.peer.num_experts", "model.peer.product_key_dim", "model.peer.expert_hidden_size",
        "model.peer.keys_per_head", "model.peer.share_experts", "model.init_std", "model.max_seq_len", "model.peer.dropout",
    }  # fmt: skip


def test_layouts_are_compared_by_the_blocks_they_give():
    one, same = ModelArgs(n_layers=3, n_dense_layers=1), ModelArgs(n_layers=3, peer_layers=[1, 2])
    assert changed_function(one, same) == {}
    assert changed_function(one, ModelArgs(n_layers=3, n_dense_layers=2)) == {"model.peer_layers": ([1, 2], [2])}
    dense = ModelArgs(n_layers=1, n_dense_layers=1)
    assert changed_function(dense, dataclasses.replace(dense, peer=PEERArgs(gates="relu"))) == {}


# ---- the tensors


def test_tensors_that_the_job_has_no_place_for_stop_it(folder):
    """Two blocks in the checkpoint, one in the job."""
    with pytest.raises(
        UserError, match=r"layers.1.attention.kv_norm.weight: the checkpoint has shape \[8\], the job has no"
    ):
        started(folder, "--model.n_layers", 1)
    job = started(folder, "--model.n_layers", 1, "--checkpoint.exclude_from_loading", "model.layers.1.*")
    assert len(job.model.layers) == 1


def test_tensors_that_the_checkpoint_lacks_stop_the_job(folder):
    with pytest.raises(
        UserError, match=r"layers.2.attention_norm.weight: the job wants shape \[16\], the checkpoint has noth"
    ):
        started(folder, "--model.n_layers", 3)
    assert started(folder, "--model.n_layers", 3, "--checkpoint.exclude_from_loading", "model.layers.2.*").step == 0


def test_an_untied_head_is_not_lost_to_a_tied_one(folder):
    tied = ["--model.tie_embeddings", "true", "--checkpoint.allow_changed", "model.tie_embeddings"]
    with pytest.raises(
        UserError, match=r"model.output.weight: the checkpoint has shape \[320, 16\], the job has no such"
    ):
        started(folder, *tied)
    job = started(folder, *tied, "--checkpoint.exclude_from_loading", "model.output.weight")
    embedding = trainer(folder).model.state_dict()["tok_embeddings.weight"]
    assert torch.equal(job.model.state_dict()["tok_embeddings.weight"], embedding)
    assert job.model.output.weight is job.model.tok_embeddings.weight


@pytest.mark.parametrize("way", ["a new job", "a new job with the optimizer", "the job itself"])
def test_doing_what_the_refusal_says_ties_the_head(folder: Path, way: str) -> None:
    def begin(*arguments: str) -> Trainer:
        if way == "the job itself":
            return trainer(folder, "--checkpoint.load_step", "2", *arguments)
        whole = ["--checkpoint.initial_load_model_only", "false"] if "optimizer" in way else []
        return started(folder, *whole, *arguments)

    tied = ["--model.tie_embeddings", "true"]
    with pytest.raises(UserError) as refused:
        begin(*tied)
    advised = re.findall(r"(--checkpoint\.(?:allow_changed|exclude_from_loading))((?: [\w.*]+)+)", str(refused.value))
    assert [flag for flag, _ in advised] == ["--checkpoint.allow_changed", "--checkpoint.exclude_from_loading"]
    job = begin(*tied, *(word for flag, values in advised for word in (flag, *values.split())))
    assert job.model.output.weight is job.model.tok_embeddings.weight
    assert job.step == (0 if way == "a new job" else 2)


def test_a_tied_model_resumes_and_can_be_untied(tmp_path):
    tied = trainer(tmp_path, "--model.tie_embeddings", "true", "--training.steps", 2)
    tied.train()
    assert trainer(tmp_path, "--model.tie_embeddings", "true").step == 2
    with pytest.raises(UserError, match=r"model.tie_embeddings = False \(was True\)"):
        started(tmp_path)
    untied = started(tmp_path, "--checkpoint.allow_changed", "model.tie_embeddings").model.state_dict()
    assert torch.equal(untied["output.weight"], tied.model.state_dict()["tok_embeddings.weight"])


# ---- the tokenizer


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    """As many entries as the checkpoint's tokenizer, with two of them exchanged."""
    content = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = "a", "b"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_resume_with_another_tokenizer_of_the_same_size_is_refused(folder, other_tokenizer):
    with pytest.raises(
        UserError, match=r"other.json \(320 entries, .*is another tokenizer than .*step-2 was trained with \(320 "
    ):
        trainer(folder, "--model.tokenizer_path", other_tokenizer)
    with pytest.raises(UserError, match="is another tokenizer"):
        started(folder, "--model.tokenizer_path", other_tokenizer)
    allowed = ["--checkpoint.allow_changed", "tokenizer"]
    assert trainer(folder, "--model.tokenizer_path", other_tokenizer, *allowed).step == 2


def test_the_same_tokenizer_in_another_file_is_the_same(folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), indent=3), encoding="utf-8")
    assert tokenizer_function(str(path)) == tokenizer_function(str(TOKENIZER))
    assert trainer(folder, "--model.tokenizer_path", path).step == 2


def test_a_tokenizer_with_another_text_for_an_id_or_another_way_to_split_is_another(tmp_path, other_tokenizer):
    same = tokenizer_function(str(TOKENIZER))
    assert tokenizer_function(str(other_tokenizer)) != same
    assert tokenizer_function("byte") != same
    content = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"model": content["model"] | {"merges": content["model"]["merges"][:-1]}},
    ):
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(content | change), encoding="utf-8")
        assert tokenizer_function(str(path)) != same, change.keys()


def last_uses(job: Trainer) -> list[Tensor]:
    return [state for name, state in job.optimizers.named_state() if name.endswith(".last_use")]


def test_a_checkpoint_without_last_uses_is_resumed_and_its_rows_count_as_up_to_date(folder, caplog) -> None:
    caplog.set_level("INFO", "titan_peer")
    job = trainer(folder)
    assert last_uses(job) and all((state == 2).all() for state in last_uses(job))
    assert "does not say when expert rows were last used" in said(caplog)
    for i, state in enumerate(last_uses(job)):
        state[i] = 1
    job.checkpointer.save(3, {"step": 3}, wait=True)
    caplog.clear()
    again = trainer(folder)
    assert all(torch.equal(a, b) for a, b in zip(last_uses(again), last_uses(job), strict=True))
    assert "does not say" not in said(caplog)


def test_last_uses_are_not_dropped_in_silence(folder) -> None:
    trainer(folder).checkpointer.save(3, {"step": 3}, wait=True)
    with pytest.raises(UserError, match=r"last_use: the checkpoint has shape \[.*the job has no such tensor"):
        trainer(folder, "--optimizer.expert_catch_up", "false")
