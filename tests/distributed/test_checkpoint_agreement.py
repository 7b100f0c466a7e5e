"""A save or load that fails on one process fails on all of them at once: none waits for a process that has stopped."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import pytest
from processes import ROOT, run_in_processes

from titan_peer.checkpoint.inference import load_model_for_inference

GOLDEN = ROOT / "tests/golden/checkpoint_version_0"
JOB = ["--job.config_file", str(GOLDEN / "small.toml"), "--model.tokenizer_path", str(GOLDEN / "step-2/tokenizer")]
PATIENCE = 400
"""Seconds that a process may take in total; waiting for a lost process would take 600 or more."""


def _trainer(folder: str, *arguments: str) -> Any:
    import torch.distributed as dist

    from titan_peer.config.parse import load_config
    from titan_peer.distributed.world import init_world
    from titan_peer.trainer import Trainer

    if not dist.is_initialized():
        init_world(load_config(JOB).parallelism)
    config = load_config([*JOB, "--job.dump_folder", folder, *arguments])
    return Trainer(config, init_world(config.parallelism))


def _save_what_one_process_cannot_copy(folder: str) -> list[str]:
    """Saves of both kinds with a tensor without data on rank 1, then one without this tensor; the message of each."""
    import torch

    from titan_peer.checkpoint.saving import CheckpointSaveError

    said = []
    for mode in ("async", "disabled"):
        trainer = _trainer(f"{folder}/{mode}", "--checkpoint.async_mode", mode)
        checkpointer, rank = trainer.checkpointer, trainer.world.rank
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logging.getLogger("titan_peer").addHandler(handler)
        state = next(iter(trainer.optimizers.rowwise.state.values()))
        if rank == 1:
            state["broken"] = torch.empty(3, device="meta")
        checkpointer.save(1, {"step": 1, "tokens_seen": 0}, wait=False)
        checkpointer.wait_until_copied()
        checkpointer.finish()
        said.append("; ".join(r.getMessage() for r in records if "could not be written" in r.getMessage()))
        try:
            checkpointer.save(2, {"step": 2, "tokens_seen": 0}, wait=True)
        except CheckpointSaveError as error:
            said.append(str(error))
        state.pop("broken", None)
        checkpointer.save(3, {"step": 3, "tokens_seen": 0}, wait=True)
        logging.getLogger("titan_peer").removeHandler(handler)
    return said


def _load_with_settings_of_ones_own(folder: str) -> str:
    """Rank 1 has another job file, in which an entry of checkpoint.exclude_from_loading is misspelt."""
    import os

    from titan_peer.common.errors import UserError

    own = ["optimiser"] if os.environ["RANK"] == "1" else ["optimizer"]
    settings = ["--checkpoint.load_step", "3", "--checkpoint.exclude_from_loading", *own]
    try:
        _trainer(f"{folder}/disabled", *settings)
    except UserError as error:
        return str(error)
    return ""


def _actions_that_fail_on_one() -> list[str]:
    import os

    from titan_peer.common.errors import UserError
    from titan_peer.distributed.collectives import ProcessesFailedError, on_all_processes

    rank = int(os.environ["RANK"])

    def fail(error: Exception) -> int:
        if rank == 1:
            raise error
        return rank

    said = [str(on_all_processes(lambda: 10 * rank))]
    for error in (
        ValueError("five"),
        OSError(28, "disk full"),
        UserError("data.path = x: is not there"),
        KeyError("k"),
    ):
        try:
            on_all_processes(lambda error=error: fail(error))
        except (ProcessesFailedError, UserError) as failure:
            said.append(f"{type(failure).__name__}: {failure}")
    return said


def _save_tables_in_parts(folder: str) -> None:
    trainer = _trainer(f"{folder}/parts", "--parallelism.expert_parallel_degree", "2")
    trainer.checkpointer.save(1, {"step": 1, "tokens_seen": 0}, wait=True)


def _everything(folder: str) -> dict[str, Any]:
    start = time.monotonic()
    _trainer(f"{folder}/first")  # joins the group
    found: dict[str, Any] = {
        "actions": _actions_that_fail_on_one(),
        "saves": _save_what_one_process_cannot_copy(folder),
    }
    found["load"] = _load_with_settings_of_ones_own(folder)
    _save_tables_in_parts(folder)
    found["seconds"] = time.monotonic() - start
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both processes, which are started once for all tests."""
    folder = tmp_path_factory.mktemp("agreement")
    results = run_in_processes(2, _everything, str(folder))
    for result in results:
        result["folder"] = folder
        assert result["seconds"] < PATIENCE
    return results


def test_a_failed_action_is_the_same_error_on_all_processes(found):
    for rank in range(2):
        assert found[rank]["actions"] == [
            "[0, 10]",
            "ProcessesFailedError: rank 1: ValueError: five",
            "ProcessesFailedError: rank 1: [Errno 28] disk full",
            "UserError: data.path = x: is not there",
            "ProcessesFailedError: rank 1: KeyError: 'k'",
        ]


def test_a_save_that_fails_on_one_process_with_any_exception_fails_on_all(found):
    for rank in range(2):
        beside, waited_for, synchronous, synchronous_waited_for = found[rank]["saves"]
        for said in (waited_for, synchronous_waited_for):
            assert "rank 1" in said and "rank 0" not in said, said
        for said in (beside, synchronous):
            assert ("rank 1" in said) == (rank == 0), said  # in the log once


def test_saves_go_on_after_one_that_failed_and_leave_nothing_of_it(found):
    for mode in ("async", "disabled"):
        folder = found[0]["folder"] / mode / "checkpoint"
        assert [path.name for path in folder.iterdir()] == ["step-3"]
        assert json.loads((folder / "step-3/train_state.json").read_text(encoding="utf-8"))["step"] == 3


def test_a_load_that_fails_on_one_process_fails_on_all(found):
    for rank in range(2):
        assert "checkpoint.exclude_from_loading: 'optimiser' matches nothing" in found[rank]["load"]


def test_tables_that_processes_saved_in_parts_are_loaded_instead_of_mapped_which_is_said(found, caplog):
    checkpoint = found[0]["folder"] / "parts/checkpoint/step-1"
    assert {path.name for path in checkpoint.glob("*.distcp")} == {
        f"__{rank}_{part}_0.distcp" for rank in range(2) for part in ("model", "state")
    }
    mapped = load_model_for_inference(checkpoint, mmap_tables=True)[0].state_dict()
    assert sum("is stored in parts and is loaded, not mapped" in record.message for record in caplog.records) == 2
    whole = load_model_for_inference(checkpoint)[0].state_dict()
    assert all(tensor.equal(mapped[name]) for name, tensor in whole.items())
