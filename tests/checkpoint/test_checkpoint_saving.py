"""Obstacles to a save: old checkpoints that cannot be removed, and file systems that lack a feature."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titan_peer.checkpoint.files import SafeReader, stored_shapes, sync, verify
from titan_peer.checkpoint.folder import CONFIG, TRAIN_STATE, saved_steps
from titan_peer.checkpoint.removal import Retention, restore_replaced
from titan_peer.checkpoint.saving import CheckpointSaveError, Ranks, write_checkpoint


def save(folder: Path, step: int, size: int = 3) -> Path:
    """A checkpoint of one tensor with `size` numbers."""
    documents = {TRAIN_STATE: b"{}", CONFIG: b""}
    return write_checkpoint(folder, step, lambda: {"model.weight": torch.ones(size)}, documents, Ranks())


def size_of(checkpoint: Path) -> int:
    verify(checkpoint)
    return stored_shapes(SafeReader(checkpoint))["model.weight"][0]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "titan_peer"]


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder in which only the modes of files decide what this process may do, even if it runs as the superuser."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        with contextlib.ExitStack() as stack:
            if os.geteuid() == 0:
                os.chown(name, 65534, 65534)
                os.seteuid(65534)
                stack.callback(os.seteuid, 0)
            yield Path(name)
        for path in Path(name).rglob("*"):
            if path.is_dir():
                path.chmod(0o700)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stand_in_the_way_of_saves(guarded, caplog):
    retention = Retention(guarded, keep_latest_k=1, keep_every_n_steps=0)
    save(guarded, 1).chmod(0o500)  # what lies in it cannot be removed
    for step in (2, 3, 4):
        retention.clear_leftovers()
        save(guarded, step)
        retention.drop_old(step)
    assert saved_steps(guarded) == [4]
    (said,) = messages(caplog)
    assert "cannot be removed and stays for now" in said and "Permission denied" in said
    (leftover,) = hidden(guarded)
    (guarded / leftover).chmod(0o700)
    retention.clear_leftovers()
    assert not hidden(guarded)


def test_an_old_checkpoint_that_cannot_even_be_renamed_stays_and_saves_go_on(guarded, caplog):
    folder = guarded / "checkpoint"
    save(folder, 1)
    save(folder, 2)
    retention = Retention(folder, keep_latest_k=1, keep_every_n_steps=0)
    folder.chmod(0o500)
    retention.drop_old(2)
    retention.drop_old(2)
    folder.chmod(0o700)
    assert saved_steps(folder) == [1, 2]
    (said,) = messages(caplog)
    assert "this old checkpoint cannot be removed and stays" in said


def test_a_checkpoint_that_is_a_link_to_other_storage_loses_the_link_only(tmp_path, caplog):
    caplog.set_level("INFO", logger="titan_peer")
    folder, storage = tmp_path / "checkpoint", tmp_path / "storage"
    save(folder, 1).rename(storage)
    (folder / "step-1").symlink_to(storage)
    retention = Retention(folder, keep_latest_k=1, keep_every_n_steps=0)
    for step in (2, 3):
        retention.clear_leftovers()
        save(folder, step)
        retention.drop_old(step)
    assert saved_steps(folder) == [3] and not hidden(folder)
    assert size_of(storage) == 3
    assert messages(caplog) == [f"{folder / 'step-1'} is a link: the link is removed, and its target {storage} stays"]


def test_leftovers_of_this_and_earlier_versions_are_removed(tmp_path):
    for name in (".step-1.partial", ".step-2.removed", ".step-3.partial-0a1b2c", ".step-4.removed-0a1b2c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("", encoding="utf-8")
    (tmp_path / ".step-5.removed").symlink_to(tmp_path)
    (tmp_path / ".stepping").mkdir()  # of another user
    Retention(tmp_path, keep_latest_k=1, keep_every_n_steps=0).clear_leftovers()
    assert hidden(tmp_path) == [".stepping"]


def test_a_name_left_by_another_save_of_the_same_step_is_no_obstacle(guarded):
    (guarded / ".step-1.partial").mkdir()
    (guarded / ".step-1.partial/file").write_text("", encoding="utf-8")
    (guarded / ".step-1.partial").chmod(0o500)
    Retention(guarded, keep_latest_k=1, keep_every_n_steps=0).clear_leftovers()
    assert size_of(save(guarded, 1)) == 3


def test_a_save_replaces_the_checkpoint_of_its_step(tmp_path):
    save(tmp_path, 1, size=3)
    assert size_of(save(tmp_path, 1, size=5)) == 5
    Retention(tmp_path, keep_latest_k=1, keep_every_n_steps=0).clear_leftovers()
    assert saved_steps(tmp_path) == [1] and not hidden(tmp_path)


def test_a_save_that_fails_at_any_stage_leaves_the_checkpoint_of_its_step(guarded):
    """Also at the last stage, when the new checkpoint is written but cannot be renamed."""
    save(guarded, 1, size=3)

    def cannot_be_made() -> dict[str, torch.Tensor]:
        raise RuntimeError("no memory for a copy")

    with pytest.raises(CheckpointSaveError, match="rank 0: RuntimeError: no memory for a copy"):
        write_checkpoint(guarded, 1, cannot_be_made, {TRAIN_STATE: b"{}"}, Ranks())
    # not writable as soon as the new checkpoint is complete under its hidden name
    for stage in ("written", "moved"):
        with pytest.raises(CheckpointSaveError, match="Permission denied"), _read_only_after(guarded, stage):
            save(guarded, 1, size=5)
        restore_replaced(guarded)
        assert size_of(guarded / "step-1") == 3, stage


@contextlib.contextmanager
def _read_only_after(folder: Path, stage: str) -> Iterator[None]:
    """Forbid renaming in `folder` when a save has written everything, or has also moved the old checkpoint aside."""
    renamed = Path.rename

    def rename(path: Path, target: Path) -> Path:
        is_last = ".partial-" in path.name or stage == "written"
        folder.chmod(0o500 if is_last else 0o700)
        try:
            return renamed(path, target)
        finally:
            folder.chmod(0o700)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Path,
            "rename",
            lambda path, target: rename(path, target) if path.parent == folder else renamed(path, target),
        )
        yield


def test_a_kill_while_a_checkpoint_is_being_replaced_loses_none(tmp_path):
    checkpoint = save(tmp_path, 1)
    checkpoint.rename(tmp_path / ".step-1.replaced-0a1b2c")  # the process was killed at this point
    restore_replaced(tmp_path)
    assert size_of(checkpoint) == 3 and not hidden(tmp_path)


def test_a_file_system_that_cannot_sync_folders_is_said_once_and_is_no_error(caplog):
    """Such as /proc, which answers EINVAL."""
    descriptor = os.open("/proc/self", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    sync(Path("/proc/self"))
    sync(Path("/proc/self/fd"))
    (said,) = messages(caplog)
    assert "cannot sync folders (Invalid argument)" in said
    with pytest.raises(OSError, match="Invalid argument"):
        sync(Path("/proc/self/status"))  # a file must be synchronised with the disk
