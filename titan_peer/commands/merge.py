"""`titan-peer merge`: the average of several checkpoints of a run, as a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from titan_peer.checkpoint.choice import find_checkpoints
from titan_peer.common.command_line import parse_options
from titan_peer.common.errors import UserError
from titan_peer.sharing.folder import new_folder

_DESCRIPTION = """Average the weights of several checkpoints of a run. The result is a checkpoint of the model only, which
eval, generate, export and checkpoint.initial_load_path take.

Examples:
  titan-peer merge --checkpoint outputs/debug_model --last 3 --output outputs/merged
  titan-peer merge --checkpoint outputs/debug_model --steps 60 80 100 --output outputs/merged"""


@dataclass
class MergeArgs:
    """The command's flags."""

    checkpoint: Path
    """A job's folder, or a folder of checkpoints."""
    output: Path
    """A new folder, which gets the checkpoint step-N, N the last of the steps."""
    last: int = 0
    """Average this many checkpoints, the newest ones."""
    steps: list[int] = field(default_factory=list)
    """Average the checkpoints of these steps."""
    ema: bool = False
    """Average the moving averages of the weights (training.ema_decay) in place of the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights; running statistics stay float32."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = parse_options(MergeArgs, words, "merge", _DESCRIPTION)
    checkpoints = _chosen(args)
    new_folder("--output", args.output, checkpoints[0].parent)

    from titan_peer.checkpoint.merge import merge_checkpoints

    print(merge_checkpoints(checkpoints, args.output, dtype=args.dtype, ema=args.ema))
    return 0


def _chosen(args: MergeArgs) -> list[Path]:
    """The checkpoints to average, in the order of their steps."""
    if bool(args.last) == bool(args.steps):
        raise UserError("give either --last K or --steps N N ...")
    found = {int(path.name.removeprefix("step-")): path for path in find_checkpoints(args.checkpoint, "--checkpoint")}
    has = f"{args.checkpoint} has checkpoints of the steps {', '.join(map(str, found))}"
    if args.last and not 1 <= args.last <= len(found):
        raise UserError(f"--last {args.last}: {has}")
    if missing := sorted(set(args.steps) - found.keys()):
        raise UserError(f"--steps {' '.join(map(str, missing))}: {has}")
    if len(set(args.steps)) < len(args.steps):
        raise UserError(f"--steps {' '.join(map(str, args.steps))}: names a step twice")
    return [found[step] for step in sorted(args.steps) or list(found)[-args.last :]]
