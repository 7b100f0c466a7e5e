"""Reports a step on the console and to every sink (`sinks.py`), and plots the loss."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_peer.config.job import JobConfig
from titan_peer.distributed.collectives import all_gather_into
from titan_peer.metrics.held_out_loss import HeldOutLoss
from titan_peer.metrics.sinks import Histogram, JsonlSink, Record, Sink, TensorBoardSink, WandbSink, complete_lines
from titan_peer.metrics.step_metrics import ReportedStep, peak_flops, step_metrics

logger = logging.getLogger("titan_peer")


@dataclass
class Progress:
    """A progress bar on a terminal; none in a log file."""

    total_steps: int
    first_step: int
    _bar: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total_steps, initial=self.first_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            logger.info(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


class MetricsLogger:
    """Turns a step's numbers into one console line and one record in every sink (first process only).

    Args:
        model: in training, of which some numbers are computed.
        training_flops_per_token: for MFU, the model's FLOPs per second as a share of the devices' bf16 peak.
        num_devices: number of devices that share the tokens.
    """

    def __init__(
        self,
        job: JobConfig,
        dump_folder: Path,
        *,
        model: nn.Module,
        device: torch.device,
        num_devices: int,
        training_flops_per_token: int,
        total_steps: int,
        resumed_step: int,
        enabled: bool,
    ) -> None:
        config = job.metrics
        self.config, self.model, self.device = config, model, device
        self.flops_per_token, self.total_steps = training_flops_per_token, total_steps
        peak = peak_flops(device)
        self.flops_per_second = peak * num_devices if peak is not None else None
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None
        if enabled:
            self.sinks.append(JsonlSink(dump_folder / "metrics.jsonl", resumed_step))
            if config.enable_tensorboard:
                self.sinks.append(TensorBoardSink(dump_folder / "tensorboard", job.to_toml(), resumed_step))
            if config.enable_wandb:
                self.sinks.append(
                    WandbSink(
                        dump_folder,
                        dataclasses.asdict(job),
                        resumed_step=resumed_step,
                        mode=config.wandb_mode,
                        group=config.wandb_group,
                        checkpoints=config.wandb_checkpoints,
                    )
                )
            self.progress = Progress(total_steps, resumed_step)
        self.start_step, self.start_time = resumed_step, time.perf_counter()
        self._window_start, self._window_tokens, self._window_first_step = self.start_time, 0, resumed_step
        self._waited_seconds = 0.0
        self._sink_errors: set[str] = set()

    def count(self, tokens: int) -> None:
        """Count a finished step's tokens (all processes together)."""
        self._window_tokens += tokens
        if self.progress is not None:
            self.progress.advance()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps a collective of a training step, in which this process waits for the slowest one."""
        start = time.perf_counter()
        yield
        self._waited_seconds += time.perf_counter() - start

    def _straggler(self, seconds: float, steps: int) -> Record:
        """Which process spent the most seconds per step outside of `waiting`, and how many more than the median
        process. Every process must call it."""
        if not dist.is_initialized():
            return {}
        own = torch.tensor([(seconds - self._waited_seconds) / steps], dtype=torch.float64)
        self._waited_seconds = 0.0
        with self.waiting():
            of_all = all_gather_into(own)
        slowest = int(of_all.argmax())
        excess = (of_all[slowest] - of_all.median()).item()
        return {
            "slowest_rank": slowest,
            "slowest_rank_seconds": round(of_all[slowest].item(), 4),
            "slowest_rank_excess_seconds": round(excess, 4),
        }

    def due(self, step: int) -> bool:
        return step == self.start_step + 1 or step % self.config.log_freq == 0 or step == self.total_steps

    def log_step(
        self, step: int, *, loss: float, grad_norm: float, lr: float, tokens_seen: int, data: Record | None = None
    ) -> None:
        """Report a step; the speed is measured over the steps since the last report."""
        now = time.perf_counter()
        seconds, steps = now - self._window_start, max(step - self._window_first_step, 1)
        reported = ReportedStep(
            self.model,
            self.device,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_seen=tokens_seen,
            steps=steps,
            tokens=self._window_tokens,
            seconds=seconds,
            elapsed_seconds=now - self.start_time,
            flops_per_second=self.flops_per_second,
            flops_per_token=self.flops_per_token,
        )
        record: Record = {"step": step, **step_metrics(reported), **(data or {})}
        line = (
            f"step {step:>6}/{self.total_steps}  loss {loss:8.4f}  grad_norm {grad_norm:8.4f}  lr {lr:.3e}  "
            f"{reported.tokens_per_second:10,.0f} tokens/s  memory {record['peak_memory_gib']:.2f} GiB"
        )
        if "mfu" in record:
            line += f"  mfu {100 * record['mfu']:.1f}%"
        straggler = self._straggler(seconds, steps)
        record.update(straggler)
        if straggler:
            line += f"  slowest rank {straggler['slowest_rank']} +{straggler['slowest_rank_excess_seconds']:.3f} s"
        line += f"  left {_duration(reported.seconds_per_step * (self.total_steps - step))}"
        self._emit(record, line)
        self._window_start, self._window_tokens, self._window_first_step = now, 0, step

    def log_validation(
        self, step: int, *, sets: dict[str, HeldOutLoss], averaged: dict[str, HeldOutLoss], seconds: float
    ) -> None:
        """Report the loss over all held-out text and on each held-out set.

        Args:
            averaged: the same of the averaged weights; empty if there are none.
        """
        overall = HeldOutLoss.over(sets.values())
        record: Record = {"step": step, **overall.record("validation_")}
        line = (
            f"step {step:>6}/{self.total_steps}  validation_loss {overall.loss:.4f}  "
            f"perplexity {overall.perplexity:.2f}  bits/byte {overall.bits_per_byte:.4f}"
        )
        for name, held_out in sets.items():
            record.update(held_out.record(f"validation/{name}_"))
            if len(sets) > 1:
                line += f"  {name} {held_out.loss:.4f}"
        if averaged:
            of_average = HeldOutLoss.over(averaged.values())
            record.update(of_average.record("validation_ema_"))
            line += f"  validation_ema_loss {of_average.loss:.4f}"
        for name, held_out in averaged.items():
            record.update(held_out.record(f"validation/{name}_ema_"))
        self._emit(record, f"{line}  ({seconds:.1f} s)")

    def log_evaluation(self, step: int, record: Record, seconds: float) -> None:
        """Report the results of a step's evaluations, by name."""
        self._emit({"step": step, **record}, f"step {step:>6}/{self.total_steps}  evaluated in {seconds:.1f} s")

    def exclude(self, seconds: float) -> None:
        """Leave time that was not spent training (validation, checkpoints) out of the current window's speed."""
        self._window_start += seconds

    def log_record(self, record: Record) -> None:
        """Numbers of a step that have no console line of their own."""
        self._tell(lambda sink: sink.write(record))

    def log_histogram(self, step: int, name: str, histogram: Histogram) -> None:
        self._tell(lambda sink: sink.histogram(step, name, histogram))

    def log_image(self, step: int, name: str, png: Path) -> None:
        self._tell(lambda sink: sink.image(step, name, png))

    def log_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint is complete in `folder`."""
        self._tell(lambda sink: sink.checkpoint(step, folder))

    def alert(self, step: int, title: str, text: str) -> None:
        """Tell every sink about something that a person should look at now."""
        self._tell(lambda sink: sink.alert(step, title, text))

    def print(self, line: str) -> None:
        """A line on the console of the first process, above the progress bar."""
        if self.progress is not None:
            self.progress.print(line)

    def _emit(self, record: Record, line: str) -> None:
        self.log_record(record)
        self.print(line)

    def _tell(self, report: Callable[[Sink], None]) -> None:
        """Report to every sink. A failing sink, such as an unreachable service, must not end the training: sinks exist
        on the first process only, and the other processes would wait for it."""
        for sink in self.sinks:
            try:
                report(sink)
            except Exception as error:
                words = f"{type(sink).__name__}: {type(error).__name__}: {error}"
                if words not in self._sink_errors:
                    logger.error("a report was lost by %s", words)
                self._sink_errors.add(words)

    def close(self) -> None:
        self._tell(lambda sink: sink.close())
        if self.progress is not None:
            self.progress.close()


def plot_loss(metrics_file: Path, output: Path, title: str) -> None:
    """Training and validation loss against steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = complete_lines(metrics_file)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    curves = (
        ("loss", "training", "-"),
        ("validation_loss", "validation (held out)", "o--"),
        ("validation_ema_loss", "validation of the averaged weights", "s:"),
    )
    for key, label, style in curves:
        points: Sequence[tuple[float, float]] = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1.5, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)
