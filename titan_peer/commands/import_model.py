"""`titan-peer import`: an exported folder as a checkpoint that decoding, evaluation and training take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_peer.common.command_line import parse_options
from titan_peer.sharing.folder import require_exported

_DESCRIPTION = """Make a checkpoint, in a run folder of its own, of a folder that titan-peer export wrote.

Examples:
  titan-peer import --input debug_model_export --output outputs/imported
  titan-peer generate --checkpoint outputs/imported --prompt "In the beginning"
  ./run_train.sh --job.config_file outputs/imported/config.toml --training.steps 100"""


@dataclass
class ImportArgs:
    """The command's flags."""

    input: Path
    """A folder that titan-peer export wrote."""
    output: Path
    """A new run folder (job.dump_folder)."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = parse_options(ImportArgs, words, "import", _DESCRIPTION)
    require_exported(args.input)

    from titan_peer.sharing.import_model import import_model

    print(import_model(args.input, args.output))
    return 0
