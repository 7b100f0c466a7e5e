"""`titan-peer export`: a checkpoint as a folder that transformers loads, and that can be shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.common.command_line import parse_options
from titan_peer.common.errors import UserError
from titan_peer.sharing.folder import TableDtype, new_folder

_DESCRIPTION = """Write a checkpoint as a folder that transformers loads (trust_remote_code=True) and that can be shared.

Examples:
  titan-peer export --checkpoint outputs/debug_model --output debug_model_export
  titan-peer export --checkpoint outputs/debug_model --output small_export --dtype bfloat16 --table_dtype int8"""


@dataclass
class ExportArgs:
    """The command's flags."""

    checkpoint: Path
    """A job's folder, whose newest checkpoint is taken, or a checkpoint, <job.dump_folder>/checkpoint/step-N."""
    output: Path
    """A new folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights; running statistics stay float32."""
    table_dtype: TableDtype = "float"
    """Dtype of the expert tables: float (as dtype), or one byte per number with a scale per row, quantised by
    torchao."""
    max_shard_size: float = 5.0
    """Largest size of a weights file in GB; a table larger than that has a file of its own."""
    ema: bool = False
    """Write the moving averages of the weights (training.ema_decay) in place of the last weights."""
    license: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Licence of the weights, for the model card, by its Hugging Face name (apache-2.0, mit ...)."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = parse_options(ExportArgs, words, "export", _DESCRIPTION)
    if args.max_shard_size <= 0:
        raise UserError(f"--max_shard_size {args.max_shard_size}: must be more than 0")
    checkpoint = find_checkpoint(args.checkpoint, "--checkpoint")
    new_folder("--output", args.output, checkpoint)

    from titan_peer.sharing.export import export_checkpoint

    export_checkpoint(
        checkpoint,
        args.output,
        dtype=args.dtype,
        table_dtype=args.table_dtype,
        max_shard_bytes=int(args.max_shard_size * 1e9),
        license_name=args.license,
        ema=args.ema,
    )
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {size / 1e9:.2f} GB in {len(list(args.output.iterdir()))} files")
    return 0
