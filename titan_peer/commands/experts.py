"""`titan-peer experts`: which experts a saved model uses on given text, and the tokens that activate them most."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from titan_peer.checkpoint.choice import WHAT_TO_GIVE, find_checkpoint
from titan_peer.checkpoint.folder import TRAIN_STATE
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import Problems, UserError
from titan_peer.config.job import JobConfig


def _parser() -> CommandParser:
    parser = CommandParser(
        "experts",
        (__doc__ or "").partition(": ")[2].capitalize(),
        "examples:\n"
        "  titan-peer experts --checkpoint outputs/debug_model --data assets/sample_text/validation.jsonl\n"
        "  titan-peer experts --checkpoint outputs/debug_model --data a.txt b.jsonl --experts 17 4242",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=WHAT_TO_GIVE)
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="text: .jsonl, .jsonl.gz, .txt, folders"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="read this many at most (default: %(default)s)")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (default: as the model was trained)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument(
        "--experts", type=int, nargs="+", metavar="N", help="show these (default: the most loaded of each layer)"
    )
    parser.add_argument(
        "--num_experts", type=int, default=4, help="most loaded experts shown per layer (default: %(default)s)"
    )
    parser.add_argument("--num_tokens", type=int, default=8, help="tokens shown per expert (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--output_dir",
        default="expert_usage",
        metavar="DIR",
        help="gets expert_usage.jsonl, the plots and tokens.txt (default: %(default)s)",
    )
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(args)
    problems = Problems()
    for name in ("tokens", "batch_size", "num_tokens", "num_experts"):
        problems.add_if(getattr(options, name) < 1, f"--{name} {getattr(options, name)}: must be at least 1")
    with problems.collected():
        checkpoint = find_checkpoint(options.checkpoint, "--checkpoint")
    problems.refuse()
    return _report(options, checkpoint)


def _report(options: argparse.Namespace, checkpoint: Path) -> int:
    import torch

    from titan_peer.checkpoint.inference import load_model_for_inference
    from titan_peer.experts import measure
    from titan_peer.experts.plots import draw
    from titan_peer.metrics.sinks import JsonlSink
    from titan_peer.model import peer_layers

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, job, tokenizer = load_model_for_inference(checkpoint, device=device)
    seq_len = job.training.seq_len if options.seq_len is None else options.seq_len
    _check_against(job, options, seq_len)
    if not list(peer_layers(model)):
        raise UserError(f"--checkpoint {checkpoint}: the model has no PEER layer")
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None

    documents = measure.read_documents(options.data, tokenizer)
    work = measure.batches(documents, seq_len, options.batch_size, options.tokens)
    usage = measure.measure(model, work, max(options.num_experts, 10))
    chosen = {u.layer: options.experts or [hot.expert for hot in u.hot[: options.num_experts]] for u in usage}
    found = measure.top_tokens(model, work, tokenizer, chosen, options.num_tokens)
    report = measure.tokens_report(found, usage)

    step = json.loads((checkpoint / TRAIN_STATE).read_text(encoding="utf-8"))["step"]
    records = JsonlSink(folder / "expert_usage.jsonl", resumed_step=0)
    for layer in usage:
        records.write({"step": step, **dataclasses.asdict(layer)})
    records.close()
    (folder / "tokens.txt").write_text(report, encoding="utf-8")
    plots = draw(folder / "expert_usage.jsonl", folder)
    num_tokens = sum(tokens.numel() for tokens, _ in work)
    measure.say_if_short(work, options.tokens)
    print(f"{num_tokens:,} tokens, {usage[0].expected:.1f} uses of an expert if usage were uniform\n")
    table = measure.usage_table(usage)
    print(table, report, f"written: {folder}/expert_usage.jsonl, tokens.txt, ", sep="\n\n", end="")
    print(", ".join(path.name for path in plots.values()))
    return 0


def _check_against(job: JobConfig, options: argparse.Namespace, seq_len: int) -> None:
    """Raise UserError for a flag that the checkpoint's job does not allow."""
    problems, longest = Problems(), job.model.max_seq_len
    problems.add_if(
        not 1 <= seq_len <= longest, f"--seq_len {seq_len}: must be from 1 to model.max_seq_len = {longest}"
    )
    num_experts = job.model.peer.num_experts
    unknown = [expert for expert in options.experts or [] if not 0 <= expert < num_experts]
    given = " ".join(map(str, unknown))
    problems.add_if(bool(unknown), f"--experts {given}: the layers have experts 0 to {num_experts - 1:,}")
    problems.refuse()
