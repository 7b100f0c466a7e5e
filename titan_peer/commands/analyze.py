"""`titan-peer analyze`: what a model consists of and what a token costs, as tables, JSON and a PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from titan_peer.checkpoint.choice import WHAT_TO_GIVE, find_checkpoint
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import Problems, UserError
from titan_peer.config.parse import load_config


def _parser() -> CommandParser:
    parser = CommandParser(
        "analyze",
        "Parameters, FLOPs, cache and memory of a job's model, which is never built.",
        "Any key of the job may also be given, as for run_train.sh.\n\nexamples:\n"
        "  titan-peer analyze --job.config_file train_configs/peer_1m.toml --output model_analysis.png\n"
        "  titan-peer analyze --job.config_file train_configs/peer_1m_multinode.toml --world_size 16 --json analysis.json\n"
        "  titan-peer analyze --job.config_file train_configs/debug_model.toml --checkpoint outputs/debug_model "
        "--output model_analysis.png",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="write a plot")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write all numbers")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help=f"also run a checkpoint of the job and count its experts: {WHAT_TO_GIVE}"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=20_000,
        metavar="N",
        help="tokens of held-out text to count them on (default: %(default)s)",
    )
    parser.add_argument(
        "--world_size",
        type=int,
        default=1,
        metavar="N",
        help="processes of the job, all machines together (default: 1)",
    )
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options, job_arguments = _parser().parse_known_args(args)
    problems = Problems()
    for name in ("world_size", "tokens"):
        problems.add_if(getattr(options, name) < 1, f"--{name} {getattr(options, name)}: must be at least 1")
    with problems.collected():
        config = load_config(job_arguments)
    with problems.collected():
        checkpoint = find_checkpoint(options.checkpoint, "--checkpoint") if options.checkpoint else None
    problems.refuse()

    from titan_peer.analysis.analyze import analyze, checkpoint_usage
    from titan_peer.analysis.tables import print_tables

    usage = checkpoint_usage(config, checkpoint, options.tokens, options.checkpoint) if checkpoint else []
    analysis = analyze(config, options.world_size, usage)
    print_tables(analysis)
    try:
        if options.json is not None:
            options.json.write_text(json.dumps(analysis.as_dict(), indent=1) + "\n", encoding="utf-8")
            print(f"numbers: {options.json}")
        if options.output is not None:
            from titan_peer.analysis.plots import draw

            draw(analysis).savefig(options.output, dpi=120)
            print(f"plot: {options.output}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return 0
