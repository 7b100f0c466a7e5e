"""`titan-peer ablate`: train variants of a job under equal conditions and say which is best."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from titan_peer.ablation.axes import load_mixes
from titan_peer.ablation.plan import Plan, Run, build_plan, plan_table
from titan_peer.ablation.solve import FREE_NUMBERS
from titan_peer.common.command_line import CommandParser
from titan_peer.common.errors import Problems, UserError

EPILOG = """Any key of the job may also be given, as for run_train.sh: it changes the base job, and so all runs.

axes (NAME, or NAME=VALUE,VALUE):
  data_mix          the mixes of --custom_datasets; without it, all sources of the base job and each alone
  expert_count      experts of a PEER layer; sub-keys follow            (default: a quarter, same, four times)
  expert_size       hidden neurons of an expert                         (default: same, twice, four times)
  cartesian_dims    product-key axes (3), or their sizes (64x16x16)     (default: 2,3,4)
  selection_heads   retrieval heads                                     (default: half, same, twice)
  any.config_key    values needed: optimizer.lr=1e-3,3e-3

examples:
  titan-peer ablate --job.config_file train_configs/debug_model.toml --axes selection_heads expert_count --tokens 5000000 --output_dir ablation_results
  titan-peer ablate --job.config_file train_configs/debug_model.toml --axes expert_size=1,2,4 optimizer.lr=1e-3,3e-3 --grid --tokens 2000000 --seeds 0 1 2 --equal flops --dry_run
  titan-peer ablate --job.config_file train_configs/debug_model.toml --axes selection_heads expert_count --tokens 5000000 --output_dir ablation_results --resume"""


def _parser() -> CommandParser:
    parser = CommandParser("ablate", "Train variants of a job under equal conditions and say which is best.", EPILOG)
    plan = parser.add_argument_group("what to compare")
    plan.add_argument(
        "--job.config_file",
        "--base_config",
        dest="config_file",
        required=True,
        metavar="FILE",
        help="the base job, of which the others are variants (--base_config means the same)",
    )
    plan.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="another way to give keys of the base job"
    )
    plan.add_argument("--axes", required=True, nargs="+", metavar="AXIS", help="what is varied: see below")
    plan.add_argument("--grid", action="store_true", help="every combination of values, not one axis at a time")
    plan.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="train each design with each of these (default: the job's)"
    )
    plan.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of a run, in whole steps (default: the base job's)"
    )
    plan.add_argument(
        "--equal",
        choices=["none", "total_parameters", "active_parameters", "flops"],
        default="none",
        help="change a free number of each design until this is as in the base job, within 2%% (default: none)",
    )
    plan.add_argument("--free", choices=list(FREE_NUMBERS), help="which free number (default: one that suits --equal)")
    plan.add_argument("--custom_datasets", metavar="FILE", help="TOML with [[mixes.NAME]] tables for the axis data_mix")
    work = parser.add_argument_group("how to run")
    work.add_argument("--output_dir", default="ablation_results", metavar="DIR", help="default: %(default)s")
    work.add_argument("--dry_run", action="store_true", help="print the runs with parameters and FLOPs, start nothing")
    work.add_argument(
        "--resume", action="store_true", help="continue what is in --output_dir; completed runs are not repeated"
    )
    work.add_argument("--retry_failed", action="store_true", help="with --resume: train failed runs once more")
    work.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs per run (on a CPU: processes); default: 1")
    work.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: as many as there are GPUs for; 1 on a CPU)"
    )
    work.add_argument("--executor", choices=["local", "slurm"], default="local", help="default: %(default)s")
    work.add_argument("--slurm_partition", default="", metavar="NAME")
    work.add_argument("--slurm_minutes", type=int, default=240, metavar="N", help="time limit per run (default: 240)")
    work.add_argument(
        "--keep_checkpoints", action="store_true", help="do not delete a run's checkpoints when it is completed"
    )
    return parser


def _base_arguments(options: argparse.Namespace, job_arguments: Sequence[str]) -> list[str]:
    """The base job as run_train.sh takes it."""
    arguments = ["--job.config_file", options.config_file]
    for setting in options.set:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: must be KEY=VALUE")
        arguments += [f"--{key}", *value.removeprefix("[").removesuffix("]").split(",")]
    return [*arguments, *job_arguments]


def _plan(options: argparse.Namespace, job_arguments: Sequence[str]) -> Plan:
    return build_plan(
        _base_arguments(options, job_arguments),
        options.axes,
        output_dir=Path(options.output_dir).absolute(),
        grid=options.grid,
        tokens=options.tokens,
        seeds=options.seeds,
        equal=options.equal,
        free=options.free,
        processes=options.gpus,
        mixes=load_mixes(options.custom_datasets) if options.custom_datasets else None,
    )


def _check(options: argparse.Namespace) -> None:
    problems = Problems()
    for name in ("gpus", "jobs", "tokens", "slurm_minutes"):
        value = getattr(options, name)
        problems.add_if(value is not None and value < 1, f"--{name} {value}: must be at least 1")
    is_negative = any(seed < 0 for seed in options.seeds or [])
    problems.add_if(is_negative, f"--seeds {' '.join(map(str, options.seeds or []))}: must not be negative")
    problems.add_if(bool(options.free) and options.equal == "none", f"--free {options.free}: needs --equal")
    problems.add_if(options.retry_failed and not options.resume, "--retry_failed: needs --resume")
    problems.refuse()


def _require_gpus(options: argparse.Namespace) -> None:
    import torch

    available = torch.cuda.device_count()
    needed = options.gpus * (options.jobs or 1)
    if options.executor == "local" and 0 < available < needed:
        raise UserError(f"--gpus {options.gpus} --jobs {options.jobs or 1}: needs {needed} GPUs, there are {available}")


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options, job_arguments = _parser().parse_known_args(args)
    _check(options)
    plan = _plan(options, job_arguments)
    _require_gpus(options)
    for note in plan.notes:
        print(f"note: {note}")
    if options.dry_run:
        print(plan_table(plan))
        total = sum(run.cost.flops for run in plan.runs)
        print(f"\n{len(plan.runs)} runs, {sum(run.cost.tokens for run in plan.runs):,} tokens, {total:.3e} FLOPs")
        return 0
    return _train(options, plan)


def _train(options: argparse.Namespace, plan: Plan) -> int:
    from titan_peer.ablation.plots import write_report
    from titan_peer.ablation.results import collect
    from titan_peer.ablation.run import StoppedError, only_here, prepare

    folder = Path(options.output_dir).absolute()
    with only_here(folder):
        to_do = prepare(
            plan.runs,
            resume=options.resume,
            retry_failed=options.retry_failed,
            keep_checkpoints=options.keep_checkpoints,
        )
        print(f"{len(plan.runs)} runs, {len(to_do)} to do; logs in {folder}/runs/*/log.txt", flush=True)
        title = f"{folder.name}: {', '.join(plan.axes)}"
        ended = len(plan.runs) - len(to_do)

        def tell(line: str) -> None:
            nonlocal ended
            ended += line.split()[0] in ("done", "failed")
            print(f"[{ended}/{len(plan.runs)}] {line}", flush=True)
            if ended:
                write_report(plan, folder, title)

        try:
            _execute(options, to_do, folder, tell)
        except StoppedError:
            print("stopped; the same command with --resume continues", file=sys.stderr)
            return 130
        print("\n" + write_report(plan, folder, title))
    return 0 if all(result.state == "done" for result in collect(plan)) else 1


def _execute(options: argparse.Namespace, to_do: Sequence[Run], folder: Path, tell: Callable[[str], None]) -> None:
    """Train the runs on this machine or as SLURM jobs, telling what starts and ends."""
    import torch

    from titan_peer.ablation.run import run_here, run_on_cluster

    if options.executor == "slurm":
        run_on_cluster(
            to_do,
            output_dir=folder,
            processes=options.gpus,
            gpus_per_run=options.gpus,
            jobs=options.jobs or max(len(to_do), 1),
            keep_checkpoints=options.keep_checkpoints,
            partition=options.slurm_partition,
            timeout_minutes=options.slurm_minutes,
            report=tell,
        )
        return
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    run_here(
        to_do,
        processes=options.gpus,
        jobs=options.jobs or max(len(gpus) // options.gpus, 1),
        gpus=gpus,
        keep_checkpoints=options.keep_checkpoints,
        report=tell,
    )
