"""Plans of ablations of the debug job, and runs that seem to have ended."""

from __future__ import annotations

import json
from pathlib import Path

from titan_peer.ablation.plan import Plan, build_plan
from titan_peer.ablation.results import Result, collect
from titan_peer.ablation.run import folder_of, prepare

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--job.config_file", str(ROOT / "train_configs/debug_model.toml"), "--optimizer.lr", "3e-3"]


def plan(tmp_path: Path, *axes: str, base: list[str] | None = None, **options: object) -> Plan:
    return build_plan([*BASE, *(base or [])], axes, output_dir=tmp_path, **options)  # type: ignore[arg-type]


def finished(found: Plan, losses: dict[str, float], **status: object) -> list[Result]:
    """The results of a plan whose runs ended with these validation losses."""
    prepare(found.runs, resume=False, retry_failed=False)
    for run in found.runs:
        steps = run.config.training.steps
        loss = losses[run.name]
        records = [
            {"step": step, "loss": loss + 1 / step, "tokens_per_second": 10.0 if step == 1 else 1000.0 + step}
            for step in range(1, steps + 1)
        ]
        records.append({"step": steps, "validation_loss": loss})
        (folder_of(run) / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
        (folder_of(run) / "status.json").write_text(json.dumps({"state": "done", **status}), encoding="utf-8")
    return collect(found)
