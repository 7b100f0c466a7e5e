"""Traces of a few steps at a fixed interval, and snapshots of what occupies a GPU's memory, while a job trains.

A trace opens in Perfetto (https://ui.perfetto.dev), a snapshot in https://pytorch.org/memory_viz. Each process writes
its own:
`<save_traces_folder>/iteration_N/rankR_trace.json.gz` with a table of the most expensive operators in the same folder,
and `<save_memory_snapshot_folder>/iteration_N/rankR_memory_snapshot.pickle`.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import torch

from titan_peer.common.errors import UserError
from titan_peer.metrics.callback import Callback, Run, RunEnd, Step

logger = logging.getLogger("titan_peer")

MAX_SNAPSHOT_ENTRIES = 100_000  # the most recent allocations and frees that a snapshot contains
_TABLE_ROWS = 30


class Profiler(Callback):
    """Makes the traces and snapshots that `[profiling]` asks for, around the training loop.

    Raises:
        UserError: memory snapshots are asked for on a device that does not support them.
    """

    def __init__(self, run: Run) -> None:
        config, device = run.config.profiling, run.world.device
        if config.enable_memory_snapshot and device.type != "cuda":
            raise UserError(
                f"profiling.enable_memory_snapshot = true: needs a CUDA device, this job runs on {device.type}"
            )
        self.config, self.rank, self.device, self.current_step = config, run.world.rank, device, run.resumed_step
        self.traces = run.dump_folder / config.save_traces_folder
        self.snapshots = run.dump_folder / config.save_memory_snapshot_folder
        self._exit = ExitStack()
        self._profile: torch.profiler.profile | None = None

    @classmethod
    def of(cls, run: Run) -> Profiler | None:
        wanted = run.config.profiling.enable_profiling or run.config.profiling.enable_memory_snapshot
        return cls(run) if wanted else None

    def start(self) -> None:
        config = self.config
        if config.enable_profiling:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            wait = config.profile_freq - config.profiler_active - config.profiler_warmup
            schedule = torch.profiler.schedule(wait=wait, warmup=config.profiler_warmup, active=config.profiler_active)
            self._profile = self._exit.enter_context(
                torch.profiler.profile(
                    activities=activities, schedule=schedule, on_trace_ready=self._write_trace, record_shapes=True
                )
            )
        if config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MAX_SNAPSHOT_ENTRIES)
            self._exit.callback(torch.cuda.memory._record_memory_history, enabled=None)

    def after_step(self, step: Step) -> None:
        self.current_step = step.number
        if self._profile is not None:
            self._profile.step()
        if self.config.enable_memory_snapshot and step.number % self.config.profile_freq == 0:
            self._write_snapshot(f"iteration_{step.number}")

    def end(self, end: RunEnd) -> None:
        if self.config.enable_memory_snapshot and isinstance(end.failure, torch.OutOfMemoryError):
            self._write_snapshot("out_of_memory")
        self._exit.close()

    def _write_trace(self, profile: torch.profiler.profile) -> None:
        start = time.perf_counter()
        folder = self.traces / f"iteration_{self.current_step}"
        sort_by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank{self.rank}_trace.json.gz"
            profile.export_chrome_trace(str(path))
            table = profile.key_averages().table(sort_by=sort_by, row_limit=_TABLE_ROWS, max_name_column_width=60)
            (folder / f"rank{self.rank}_operators.txt").write_text(table, encoding="utf-8")
        except OSError as error:  # a full disk must not end the training
            logger.error("no trace of step %d: %s", self.current_step, error)
            return
        logger.info("trace of step %d in %s (%.1f s)", self.current_step, path, time.perf_counter() - start)

    def _write_snapshot(self, name: str) -> None:
        path = self.snapshots / name / f"rank{self.rank}_memory_snapshot.pickle"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:
            logger.error("no memory snapshot after step %d: %s", self.current_step, error)
            return
        logger.info("memory snapshot after step %d in %s", self.current_step, path)
