"""Checkpoints on disk: complete or not there, verified, opened for inference."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy as copy_of
from pathlib import Path

import pytest
import torch

from titan_peer.checkpoint import load_model_for_inference
from titan_peer.config import load_config
from titan_peer.errors import UserError
from titan_peer.parallelize import init_world
from titan_peer.train import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--compile.enable", "false"]
SMALL += ["--validation.enable", "false", "--training.mixed_precision_param", "float32", "--training.gc_freq", "0"]
SMALL += ["--training.seq_len", "64", "--training.local_batch_size", "2", "--metrics.log_freq", "1"]
SMALL += ["--model.dim", "64", "--model.n_layers", "2", "--model.peer.num_experts", "1024"]
SMALL += ["--model.peer.product_key_dim", "32", "32", "--training.steps", "4", "--checkpoint.interval", "2"]


def trainer(dump_folder: Path, *arguments: object) -> Trainer:
    config = load_config([*SMALL, "--job.dump_folder", str(dump_folder), *map(str, arguments)])
    return Trainer(config, init_world(config.parallelism))


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def tensor_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


@pytest.fixture(scope="module", autouse=True)
def from_the_repository_root():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    job = trainer(tmp_path_factory.mktemp("trained"))
    assert job.train() == 0
    return job


@pytest.fixture(scope="module")
def checkpoint(trained: Trainer) -> Path:
    return trained.checkpointer.folder / "step-4"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "step-4"))


def trained_logits(job: Trainer) -> torch.Tensor:
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        return job.model.eval()(tokens)


# ---- opened for inference


@pytest.mark.parametrize("mmap_tables", [False, True])
def test_a_model_opened_for_inference_computes_what_the_trained_one_does(trained, checkpoint, mmap_tables):
    model, job, tokenizer = load_model_for_inference(checkpoint, mmap_tables=mmap_tables)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (job.model, tokenizer.vocab_size) == (trained.config.model, 4096)
    with torch.no_grad():
        logits = model(torch.arange(48).view(2, 24))
    assert torch.equal(logits, trained_logits(trained))


def test_mapped_tables_take_no_memory_until_they_are_used(trained, checkpoint):
    model, _, _ = load_model_for_inference(checkpoint, mmap_tables=True)
    table = model.layers[0].peer.experts.expert_down
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(tensor_file(checkpoint)) in line]
    assert any(int(start, 16) <= table.data_ptr() < int(end, 16) for start, end in spans)


def test_a_model_opened_in_bfloat16_is_the_rounded_one(trained, checkpoint):
    model, _, _ = load_model_for_inference(checkpoint, dtype=torch.bfloat16)
    rounded = copy_of(trained.model).eval()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        tokens = torch.arange(48).view(2, 24)
        assert torch.equal(model(tokens), rounded(tokens))


def test_a_checkpoint_is_self_contained(checkpoint, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # away from the tokenizer and the job's files
    tokenizer = load_model_for_inference(copy)[2]
    assert tokenizer.decode(*tokenizer.encode_batch(["In the beginning"])) == "In the beginning"


def test_tied_embeddings_are_tied_after_opening(tmp_path):
    job = trainer(tmp_path, "--model.tie_embeddings", "true", "--training.steps", "1")
    job.train()
    model, _, _ = load_model_for_inference(job.checkpointer.folder / "step-1")
    assert model.output.weight is model.tok_embeddings.weight
    with torch.no_grad():
        assert torch.equal(model(torch.arange(48).view(2, 24)), trained_logits(job))


@pytest.mark.parametrize("mmap_tables", [False, True])
def test_a_truncated_file_is_named_when_a_model_is_opened(copy, mmap_tables):
    path = tensor_file(copy)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"{path} has [\d,]+ bytes, its manifest says"):
        load_model_for_inference(copy, mmap_tables=mmap_tables)


def test_a_flipped_bit_is_named_when_a_model_is_opened(copy):
    flip_a_bit(tensor_file(copy))
    with pytest.raises(UserError, match=f"{tensor_file(copy)} has another CRC-32"):
        load_model_for_inference(copy)


def test_a_foreign_folder_is_an_error_that_says_what_is_wanted(trained, tmp_path):
    with pytest.raises(UserError, match=r"has no train_state\.json; give a folder <job.dump_folder>/checkpoint/step-N"):
        load_model_for_inference(tmp_path)
    with pytest.raises(UserError, match="is not there"):
        load_model_for_inference(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"the newest in it is .*step-4"):
        load_model_for_inference(trained.dump_folder)


def test_an_index_that_asks_for_code_is_refused(copy):
    """A manifest proves only that files are unchanged since it was written; it does not vouch for who wrote it."""
    import pickle
    import zlib

    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    (copy / ".metadata").write_bytes(pickle.dumps(Attack()))
    manifest = json.loads((copy / "manifest.json").read_text())
    content = (copy / ".metadata").read_bytes()
    manifest["files"][".metadata"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"asks for builtins\.print"):
        load_model_for_inference(copy)
