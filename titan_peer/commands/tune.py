"""`titan-peer tune`: measure how the GPU kernels of a job are best launched, and keep the result for later runs."""

from __future__ import annotations

from collections.abc import Sequence

from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config

DESCRIPTION = """Measures how the GPU kernels of a job are best launched and writes the result where later runs find it.

For every kernel of the expert operators it times the launches near the built-in rule's, and the other ways to do the same
(atomic or sorted gradients, scores by tiles or by matmul), at the job's shapes and dtypes. Kernels also run without this.
"""


def _parser() -> CommandParser:
    parser = CommandParser(
        "tune",
        DESCRIPTION,
        "Any key of the job may also be given, as for run_train.sh.\n\nexamples:\n"
        "  titan-peer tune --job.config_file train_configs/peer_1m.toml\n"
        "  titan-peer tune --job.config_file train_configs/peer_1m.toml --tokens 16384 "
        "--training.mixed_precision_param bfloat16",
    )
    parser.add_argument(
        "--job.config_file",
        "--config_file",
        dest="config_file",
        required=True,
        metavar="FILE",
        help="the job whose kernels are tuned (--config_file means the same)",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens in a micro-batch (default: those of the job's local batch)"
    )
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options, overrides = _parser().parse_known_args(args)
    config = load_config(["--job.config_file", options.config_file, *overrides])
    tokens = config.training.local_batch_size * config.training.seq_len if options.tokens is None else options.tokens
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: must be at least 1")

    import torch

    if not torch.cuda.is_available():
        raise UserError("titan-peer tune: needs a CUDA device; none is visible, and CPU kernels have nothing to tune")
    from titan_peer.analysis.kernel_tuning import gpu_milliseconds, tune
    from titan_peer.ops.triton import tuning

    device = torch.device("cuda", torch.cuda.current_device())
    results = tune(config, device, tokens, gpu_milliseconds)
    path = tuning.save({problem: result.best for problem, result in results.items()}, device)
    print(f"{len(results)} launches written to {path}")
    return 0
