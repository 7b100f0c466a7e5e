"""Destinations of a run's reports: JSON lines, TensorBoard, Weights & Biases. Every sink takes the same calls.

Only the first process of a job has sinks. JSON lines are always written; the others are optional
(`titan_peer[logging]`).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from titan_peer.common.errors import UserError

logger = logging.getLogger("titan_peer")

Record = dict[str, Any]
"""One report: "step" and numbers, by name."""


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie from edges[i] to edges[i + 1]."""

    edges: Sequence[float]
    counts: Sequence[int]

    def midpoints(self) -> list[float]:
        return [(low + high) / 2 for low, high in zip(self.edges, self.edges[1:])]


class Sink:
    """A destination of reports; each sink overrides the methods that it supports."""

    def write(self, record: Record) -> None:
        """Numbers of a step."""

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """A distribution at a step."""

    def image(self, step: int, name: str, png: Path) -> None:
        """A plot as it is at a step."""

    def alert(self, step: int, title: str, text: str) -> None:
        """Something that a person should look at now."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """A complete checkpoint."""

    def close(self) -> None:
        """Write what is still buffered."""


class JsonlSink(Sink):
    """One JSON object per record in `path`; a resumed run first removes the records of an earlier run beyond its
    step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in complete_lines(path) if resumed_step and line["step"] <= resumed_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replacement = path.with_suffix(".jsonl.partial")
        replacement.write_text(text, encoding="utf-8")
        replacement.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._try("written", self._file.flush)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        edges, counts = list(histogram.edges), list(histogram.counts)
        self.write({"step": step, "histogram": name, "edges": edges, "counts": counts})

    def alert(self, step: int, title: str, text: str) -> None:
        self.write({"step": step, "alert": title, "text": text})

    def close(self) -> None:
        self._try("closed", self._file.close)

    def _try(self, what: str, action: Callable[[], None]) -> None:
        """A full disk must not end the training; what could not be written stays buffered for the next record."""
        try:
            action()
        except OSError as error:
            logger.error("%s could not be %s: %s", self._file.name, what, error.strerror)


def complete_lines(path: Path) -> list[Record]:
    """Records of a .jsonl file; an incomplete last line, as a killed job may leave it, is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


class TensorBoardSink(Sink):
    """Event files in `folder`; events of an earlier run beyond the resumed step are hidden."""

    def __init__(self, folder: Path, config_toml: str, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "metrics.enable_tensorboard = true: needs tensorboard; install it with: pip install 'titan_peer[logging]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)
        self._writer.add_text("config", f"```toml\n{config_toml}\n```", resumed_step)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        weighted = list(zip(histogram.midpoints(), histogram.counts))
        self._writer.add_histogram_raw(
            name,
            min=histogram.edges[0],
            max=histogram.edges[-1],
            num=sum(histogram.counts),
            sum=sum(middle * count for middle, count in weighted),
            sum_squares=sum(middle**2 * count for middle, count in weighted),
            bucket_limits=list(histogram.edges[1:]),
            bucket_counts=list(histogram.counts),
            global_step=step,
        )

    def image(self, step: int, name: str, png: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(png)[..., :3], step, dataformats="HWC")

    def alert(self, step: int, title: str, text: str) -> None:
        self._writer.add_text("alert", f"**{title}**\n\n{text}", step)

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A Weights & Biases run, online or offline. A resumed job continues the run whose id is stored in `folder`.

    Args:
        folder: the job's; its name becomes the run's name.
        config: shown as the run's configuration.
        mode: with "online", the environment variable WANDB_MODE may still override it.
        checkpoints: "reference" records a checkpoint's path, "upload" stores a copy, "none" does neither.
    Raises:
        UserError: wandb is not installed, or the service refuses the login or cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        resumed_step: int,
        mode: Literal["online", "offline"],
        group: str,
        checkpoints: Literal["none", "reference", "upload"],
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "metrics.enable_wandb = true: needs wandb; install it with: pip install 'titan_peer[logging]'"
            ) from None
        self._wandb, self._checkpoints, self._name = wandb, checkpoints, folder.name
        id_file = folder / "wandb_run_id"
        known = id_file.read_text(encoding="utf-8").strip() if resumed_step and id_file.exists() else None
        try:
            self._run = wandb.init(
                dir=str(folder),
                config=config,
                name=folder.name,
                group=group or None,
                id=known,
                resume="allow" if known and mode == "online" else None,
                mode="offline" if mode == "offline" else None,
            )
        except wandb.Error as error:
            raise UserError(
                f"metrics.enable_wandb = true: {error}; log in with `wandb login` or WANDB_API_KEY, or log to files with "
                "--metrics.wandb_mode offline"
            ) from None
        id_file.write_text(self._run.id + "\n", encoding="utf-8")
        # Our steps are an ordinary metric: after a resume they go back, which W&B's own step counter cannot do.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log(record)

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        bins = (np.array(histogram.counts), np.array(histogram.edges))
        self._run.log({"step": step, name: self._wandb.Histogram(np_histogram=bins)})

    def image(self, step: int, name: str, png: Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(png))})

    def alert(self, step: int, title: str, text: str) -> None:
        self._run.alert(title, f"step {step}: {text}", level="ERROR")

    def checkpoint(self, step: int, folder: Path) -> None:
        if self._checkpoints == "none":
            return
        artifact = self._wandb.Artifact(f"{self._name}-checkpoint", type="model", metadata={"step": step})
        if self._checkpoints == "upload":
            artifact.add_dir(str(folder))
        else:
            # The folder's manifest already has sizes and checksums; hashing all files again would hold up training.
            artifact.add_reference(folder.absolute().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=[f"step-{step}", "latest"])

    def close(self) -> None:
        self._run.finish()
