"""A slow process is named, with its additional time; dense parameters in host memory do not change the losses."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import free_port, losses, run_in_processes

from titan_peer import train, trainer

JOB = [
    *("--job.config_file", "train_configs/debug_model.toml", "--training.steps", 6, "--metrics.log_freq", 3),
    *("--training.seq_len", 32, "--training.local_batch_size", 1, "--model.n_layers", 1, "--compile.enable", "false"),
    *("--validation.enable", "false", "--checkpoint.enable", "false", "--training.mixed_precision_param", "float32"),
]
DELAY = 1.0


class SlowLoader:
    """The batches of another loader, each after a delay."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            time.sleep(DELAY)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class SlowTrainer(trainer.Trainer):
    def _open_data(self) -> None:
        super()._open_data()
        if self.world.rank == 1:
            self.loader = SlowLoader(self.loader)


def _train(slow: list[str], plain: list[str], offloaded: list[str], ports: list[int]) -> None:
    for arguments, port, kind in zip(
        (slow, plain, offloaded), ports, (SlowTrainer, trainer.Trainer, trainer.Trainer), strict=True
    ):
        os.environ["MASTER_PORT"] = str(port)
        trainer.Trainer = kind  # type: ignore[misc]
        assert train.main(arguments) == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp(name) for name in ("slow", "plain", "offloaded")]
    jobs = [[*map(str, JOB), "--job.dump_folder", str(folder)] for folder in folders]
    jobs[2] += ["--training.enable_cpu_offload", "true"]
    run_in_processes(2, _train, *jobs, [free_port() for _ in jobs])
    return folders


def test_the_slow_process_is_named_with_its_excess(folders: list[Path]) -> None:
    records = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["slowest_rank"] for r in records] == [1, 1, 1]
    for record in records[1:]:  # the first step also has start-up costs
        assert record["slowest_rank_excess_seconds"] == pytest.approx(DELAY, abs=0.5)
        assert record["slowest_rank_seconds"] >= DELAY


def test_offloaded_parameters_train_the_same(folders: list[Path]) -> None:
    plain, offloaded = losses(folders[1]), losses(folders[2])
    assert len(plain) == 3 and offloaded == pytest.approx(plain, rel=1e-6)
