"""`titan-peer estimate`: the memory per process of a job, before it is launched."""

from __future__ import annotations

import json
from collections.abc import Sequence

from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import Problems
from titan_peer.common.units import bytes_text
from titan_peer.config.parse import load_config


def _parser() -> CommandParser:
    parser = CommandParser(
        "estimate",
        "The memory that each process of a job will take. Nothing is allocated: a training step runs on fake tensors.",
        "Any key of the job may also be given, as for run_train.sh.\n\nexamples:\n"
        "  titan-peer estimate --job.config_file train_configs/peer_1m.toml --training.local_batch_size 4\n"
        "  titan-peer estimate --job.config_file train_configs/peer_1m_multinode.toml --world_size 16",
    )
    parser.add_argument(
        "--world_size",
        type=int,
        default=1,
        metavar="N",
        help="processes of the job, all machines together (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes by kind")
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options, job_arguments = _parser().parse_known_args(args)
    problems = Problems()
    problems.add_if(options.world_size < 1, f"--world_size {options.world_size}: must be at least 1")
    with problems.collected():
        config = load_config(job_arguments)
    problems.refuse()

    import torch

    from titan_peer.analysis.estimate import estimate_memory

    estimate = estimate_memory(config, options.world_size)
    if options.json:
        print(json.dumps({**estimate.rows(), "total": estimate.total}))
        return 0
    rows = {**estimate.rows(), "most at a time": estimate.total}
    width = max(map(len, rows))
    for name, size in rows.items():
        print(f"{name:<{width}}  {bytes_text(size):>12}")
    if torch.cuda.is_available():
        print("Tensors only; the GPU's allocator also keeps some memory in reserve.")
    else:
        print("process: interpreter and libraries of a CPU run; a GPU has the tensors only.")
    return 0
