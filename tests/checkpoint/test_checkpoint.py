"""Checkpoints on disk: complete or absent, verified, opened for inference."""

from __future__ import annotations

import json
import resource
import shutil
import time
from copy import deepcopy as copy_of
from pathlib import Path

import pytest
import torch
from small_jobs import SMALL, flip_a_bit, steps, tensors_of, trainer
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from titan_peer.checkpoint.files import NotMappableError, SafeReader, map_tensor, stored_shapes, verify
from titan_peer.checkpoint.inference import load_model_for_inference
from titan_peer.common.errors import UserError
from titan_peer.model import Experts
from titan_peer.train import main
from titan_peer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def tensor_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*_model_*.distcp"))


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
    return trained.checkpointer.folder / "step-6"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "step-6"))


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
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(tensor_file(checkpoint)) in line]
    assert any(int(start, 16) <= table.data_ptr() < int(end, 16) for start, end in spans)


def test_a_model_opened_in_bfloat16_is_the_rounded_one(trained, checkpoint):
    model, _, _ = load_model_for_inference(checkpoint, dtype=torch.bfloat16)
    rounded = copy_of(trained.model).eval()
    low_precision = {parameter for m in rounded.modules() if isinstance(m, Experts) for parameter in m.parameters()}
    low_precision |= {m.weight for m in rounded.modules() if isinstance(m, torch.nn.Linear)}
    for parameter in low_precision:
        parameter.data = parameter.data.bfloat16()
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = rounded(tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


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


def test_a_foreign_folder_is_an_error_that_says_what_is_wanted(tmp_path):
    with pytest.raises(UserError, match=r"has no complete checkpoint in it; give a job's folder .*checkpoint/step-N"):
        load_model_for_inference(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_model_for_inference(tmp_path / "nothing")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="is not a folder"):
        load_model_for_inference(tmp_path / "file")


def test_inference_reads_nothing_of_the_optimizers_files_and_a_resume_does(trained, copy, tmp_path):
    (state,) = copy.glob("*_state_*.distcp")
    names = {index.fqn: info.relative_path for index, info in SafeReader(copy).read_metadata().storage_data.items()}
    assert {name.partition(".")[0] for name, file in names.items() if file == state.name} == {"optimizer", "rng"}
    state.write_bytes(b"")
    for mmap_tables in (False, True):
        model = load_model_for_inference(copy, mmap_tables=mmap_tables)[0]
        with torch.no_grad():
            assert torch.equal(model(torch.arange(48).view(2, 24)), trained_logits(trained))
    (tmp_path / "job/checkpoint").mkdir(parents=True)
    copy.rename(tmp_path / "job/checkpoint/step-6")
    with pytest.raises(UserError, match=rf"all of .* are damaged: .*{state.name} has 0 bytes"):
        trainer(tmp_path / "job")


def test_saved_tensors_are_aligned_so_that_tables_can_be_used_where_they_lie(checkpoint, caplog):
    reader = SafeReader(checkpoint)
    infos = reader.read_metadata().storage_data.values()
    assert all(info.offset % 64 == 0 for info in infos)
    expected = tensors_of(checkpoint)
    assert expected.keys() == stored_shapes(reader).keys()
    for name in expected:
        tensor = map_tensor(reader, name)
        assert tensor.data_ptr() % 64 == 0 and torch.equal(tensor, expected[name]), name
    load_model_for_inference(checkpoint, mmap_tables=True)
    assert not [r for r in caplog.records if "not mapped" in r.message]


def test_a_table_that_an_earlier_version_left_unaligned_is_loaded_instead_of_mapped_and_said(caplog):
    old = ROOT / "tests/golden/checkpoint_version_0/step-2"
    reader, down = SafeReader(old), "layers.1.peer.experts.expert_down"
    places = {index.fqn: info.offset for index, info in reader.read_metadata().storage_data.items()}
    assert places[f"model.{down}"] % 4  # as nearly all checkpoints were
    with pytest.raises(NotMappableError, match=r"not aligned in __0_0\.distcp"):
        map_tensor(reader, f"model.{down}")
    model = load_model_for_inference(old, mmap_tables=True)[0]
    assert torch.equal(model.state_dict()[down], tensors_of(old)[f"model.{down}"])
    said = [r.message for r in caplog.records if "loaded, not mapped" in r.message]
    assert any(down in message for message in said)


def test_an_index_that_asks_for_code_is_refused(copy):
    """A manifest proves only that files are unchanged since it was written, not who wrote them."""
    import pickle
    import zlib

    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    (copy / ".metadata").write_bytes(pickle.dumps(Attack()))
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    content = (copy / ".metadata").read_bytes()
    manifest["files"][".metadata"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"asks for builtins\.print"):
        load_model_for_inference(copy)


# ---- saved and resumed


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture
def straight(trained: Trainer) -> Path:
    return trained.dump_folder


def test_an_asynchronous_save_holds_the_state_of_its_step_not_of_a_later_one(straight, tmp_path, monkeypatch):
    """This also holds if copying takes longer than the whole next forward and backward pass."""
    stage = StateDictStager.stage

    def stage_late(self, state_dict, **kwargs):
        time.sleep(0.5)
        return stage(self, state_dict, **kwargs)

    monkeypatch.setattr(StateDictStager, "stage", stage_late)
    trainer(tmp_path, "--checkpoint.async_mode", "async").train()
    assert steps(tmp_path) == ["step-2", "step-4", "step-6"]
    assert losses(tmp_path) == losses(straight)
    for step in ("step-2", "step-4", "step-6"):
        saved, expected = tensors_of(tmp_path / "checkpoint" / step), tensors_of(straight / "checkpoint" / step)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved), step


def test_the_newest_k_and_every_nth_checkpoint_stay(tmp_path):
    settings = ["--checkpoint.interval", 1, "--training.steps", 7]
    trainer(tmp_path, *settings, "--checkpoint.keep_latest_k", 2, "--checkpoint.keep_every_n_steps", 3).train()
    assert steps(tmp_path) == ["step-3", "step-6", "step-7"]


def test_old_checkpoints_that_were_moved_to_other_storage_do_not_end_the_saving(straight, tmp_path):
    """The files have been replaced by links."""
    storage = tmp_path / "storage"
    shutil.copytree(straight, tmp_path / "job")
    shutil.move(tmp_path / "job/checkpoint/step-2", storage)
    (tmp_path / "job/checkpoint/step-2").symlink_to(storage)
    arguments = ["--training.steps", "9", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "1"]
    assert main([*SMALL, "--job.dump_folder", str(tmp_path / "job"), *arguments]) == 0
    assert steps(tmp_path / "job") == ["step-9"]
    verify(storage)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "no manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(straight, tmp_path, damage, caplog):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    path = tensor_file(tmp_path / "checkpoint/step-6")
    if damage == "flipped bit":
        flip_a_bit(path, at=0.9)
    elif damage == "truncated":
        with path.open("r+b") as file:
            file.truncate(1000)
    else:
        path = path if damage == "missing" else tmp_path / "checkpoint/step-6/manifest.json"
        path.unlink()
    caplog.set_level("INFO", logger="titan_peer")
    job = trainer(tmp_path, "--checkpoint.keep_latest_k", 1)
    assert job.step == 4
    assert any(r.levelname == "ERROR" and str(path) in r.message for r in caplog.records)
    assert "step-6.damaged" in steps(tmp_path)
    job.train()
    assert losses(tmp_path) == losses(straight)
    assert steps(tmp_path) == ["step-6", "step-6.damaged"]  # the damaged one does not count as the newest


def test_no_sound_checkpoint_stops_the_job_and_changes_nothing(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint/step-6")
    flip_a_bit(tensor_file(tmp_path / "checkpoint/step-6"))
    with pytest.raises(UserError, match="all of step-6"):
        trainer(tmp_path)
    assert steps(tmp_path) == ["step-6"]


def test_going_back_to_an_older_step_sets_the_newer_ones_aside(straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    back = ["--checkpoint.load_step", 2, "--training.steps", 5]
    assert trainer(tmp_path, *back).train() == 0
    assert steps(tmp_path) == ["step-2", "step-4", "step-4.superseded", "step-5", "step-6.superseded"]
    # a restart by torchrun repeats the command, and must not go back a second time
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert trainer(tmp_path, *back).step == 5


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(straight):
    with pytest.raises(UserError, match=r"checkpoint.load_step = 3: .* has the steps \[2, 4, 6\]"):
        trainer(straight, "--checkpoint.load_step", 3)


def test_a_model_only_checkpoint_at_the_end_is_small_and_opens_for_inference(straight, tmp_path):
    settings = ["--checkpoint.last_save_model_only", "true", "--checkpoint.export_dtype", "bfloat16"]
    job = trainer(tmp_path, *settings)
    job.train()
    folder = tmp_path / "checkpoint/step-6"
    full = tensors_of(straight / "checkpoint/step-6")
    exported = tensors_of(folder)
    assert set(exported) == {name for name in full if name.startswith("model.")}
    for name, tensor in exported.items():
        is_buffer = name.endswith(("running_mean", "running_var"))
        assert torch.equal(tensor, full[name] if is_buffer else full[name].bfloat16()), name
    model = load_model_for_inference(folder, dtype=torch.bfloat16, mmap_tables=True)[0]
    with torch.no_grad():
        assert model(torch.arange(48).view(2, 24)).isfinite().all()
    # the same command again has nothing to do; more steps need the optimizer's state
    assert trainer(tmp_path, *settings).train() == 0
    with pytest.raises(UserError, match=r"holds only the model .* --checkpoint.initial_load_path"):
        trainer(tmp_path, "--training.steps", 9)


def test_a_job_starts_from_another_jobs_model(straight, tmp_path):
    source = straight / "checkpoint/step-4"
    job = trainer(tmp_path, "--checkpoint.initial_load_path", source)
    assert (job.step, job.loader.sequences_seen) == (0, 0)
    saved = tensors_of(source)
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"]), name
    assert all(not state.any() for name, state in job.optimizers.named_state())
    job.train()
    # once the job has checkpoints of its own, it resumes from them
    assert trainer(tmp_path, "--checkpoint.initial_load_path", source).step == 6


def test_a_job_continues_another_jobs_training_elsewhere(straight, tmp_path):
    source = straight / "checkpoint/step-4"
    settings = ["--checkpoint.initial_load_path", source, "--checkpoint.initial_load_model_only", "false"]
    trainer(tmp_path, *settings).train()
    assert losses(tmp_path) == {step: loss for step, loss in losses(straight).items() if step > 4}


def test_a_job_with_normalized_experts_resumes_with_the_same_bits(tmp_path):
    settings = ["--optimizer.expert_optimizer", "normalized", "--optimizer.expert_moment_dtype", "bfloat16"]
    trainer(tmp_path / "straight", *settings).train()
    shutil.copytree(tmp_path / "straight/checkpoint/step-4", tmp_path / "resumed/checkpoint/step-4")
    trainer(tmp_path / "resumed", *settings).train()
    expected = {step: loss for step, loss in losses(tmp_path / "straight").items() if step > 4}
    assert expected and losses(tmp_path / "resumed") == expected


def test_what_is_excluded_from_loading_stays_as_it_was_made(straight, tmp_path):
    source = straight / "checkpoint/step-4"
    settings = ["--checkpoint.initial_load_path", source, "--checkpoint.initial_load_model_only", "false"]
    exclude = ["--checkpoint.exclude_from_loading", "optimizer", "dataloader", "model.output.*"]
    job, fresh = trainer(tmp_path / "a", *settings, *exclude), trainer(tmp_path / "b")
    assert (job.step, job.loader.sequences_seen) == (4, 0)
    assert all(not state.any() for _, state in job.optimizers.named_state())
    assert torch.equal(job.model.output.weight, fresh.model.output.weight)
    assert torch.equal(job.model.tok_embeddings.weight, tensors_of(source)["model.tok_embeddings.weight"])
    with pytest.raises(UserError, match="exclude_from_loading: 'optimiser' matches nothing; allowed: model, optimizer"):
        trainer(tmp_path / "c", *settings, "--checkpoint.exclude_from_loading", "optimiser")


def test_a_checkpoint_of_another_model_is_refused_by_the_tensors_name(straight, tmp_path):
    with pytest.raises(
        UserError, match=r"sub_keys.1: the job wants shape \[4, 64, 64\], the checkpoint has shape \[4, 32, 64\]"
    ):
        trainer(
            tmp_path, "--checkpoint.initial_load_path", straight / "checkpoint/step-4", "--model.peer.num_experts", 2048,
            "--model.peer.product_key_dim", 32, 64,
        )  # fmt: skip


# ---- nowhere to write


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_without_space_training_goes_on_and_the_job_ends_with_an_error(straight, tmp_path, mode, caplog, capsys):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint/step-6")
    arguments = [*SMALL, "--job.dump_folder", str(tmp_path), "--training.steps", "10", "--checkpoint.async_mode", mode]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, unlimited[1])
    )  # no file may be longer, as on a disk almost full
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    failed = [r.message for r in caplog.records if r.levelname == "ERROR" and "could not be written" in r.message]
    assert [message.split(" could")[0] for message in failed] == [f"the checkpoint of step {n}" for n in (6, 8, 10)]
    assert all("rank 0: " in message and "File too large" in message for message in failed)
    assert "error: the job ends without its last checkpoint: rank 0: " in capsys.readouterr().err
    assert sorted(losses(tmp_path)) == list(range(1, 11))
    assert steps(tmp_path) == ["step-2", "step-4"]
    for step in ("step-2", "step-4"):
        verify(tmp_path / "checkpoint" / step)
    # once there is space again, the same command saves it
    assert main(arguments) == 0
    assert steps(tmp_path)[0] == "step-10"


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "checkpoint").write_text("a file, not a folder", encoding="utf-8")
    with pytest.raises(UserError, match=r"checkpoint.folder = checkpoint: cannot be written to: rank 0: .*File exists"):
        trainer(tmp_path)
