"""Whole jobs as a user starts them: real text, real checkpoints, real kills.

Jobs of one process whose launch is not tested start in a warm process; test_launch.py tests run_train.sh.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_processes

ROOT = Path(__file__).resolve().parent.parent
DEBUG = ["--job.config_file", "train_configs/debug_model.toml"]
TINY = [*DEBUG, "--compile.enable", "false", "--validation.enable", "false", "--metrics.log_freq", "1"]
TINY += ["--training.seq_len", "64", "--training.local_batch_size", "2", "--model.n_layers", "2"]


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["./run_train.sh", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    return warm_processes.run(warm_processes.TRAIN, *arguments)


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def records(folder: Path, key: str = "loss") -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and max(records(folder), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_debug_model_learns_and_reports(tmp_path: Path) -> None:
    done = run(*DEBUG, "--job.dump_folder", tmp_path)
    assert done.returncode == 0, done.stderr
    loss = records(tmp_path)
    assert loss[1] - loss[100] >= 2.0
    assert 0 < records(tmp_path, "validation_loss")[100] < loss[1]
    assert "active per token" in done.stderr and "C++ kernels" in done.stderr
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    for key in ("grad_norm", "lr", "tokens_per_second", "tokens_seen"):
        assert set(records(tmp_path, key)) == set(loss)


def test_killed_and_resumed_run_repeats_the_losses_to_the_last_digit(tmp_path: Path) -> None:
    settings = [*TINY, "--training.steps", 20, "--checkpoint.interval", 10]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(*settings, "--job.dump_folder", straight).returncode == 0
    process = start(*settings, "--job.dump_folder", killed)
    wait_for_step(killed, 12)
    process.kill()
    process.wait()
    assert (killed / "checkpoint" / "step-10").is_dir()
    resumed = train(*settings, "--job.dump_folder", killed)
    assert resumed.returncode == 0 and "resumed from step 10" in resumed.stderr
    assert records(killed) == records(straight)
    assert len((killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 20


def test_sigterm_saves_and_ends_with_status_zero(tmp_path: Path) -> None:
    settings = [*TINY, "--job.dump_folder", tmp_path, "--training.steps", 100_000]
    process = start(*settings)
    wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "the same command resumes" in err
    (checkpoint,) = (tmp_path / "checkpoint").iterdir()
    assert checkpoint.name == f"step-{max(records(tmp_path))}"


def test_two_processes_follow_one_process(tmp_path: Path) -> None:
    settings = [*TINY, "--training.steps", 5, "--training.global_batch_size", 4, "--checkpoint.enable", "false"]
    settings += ["--training.mixed_precision_param", "float32"]
    # batch norm uses the statistics of the micro-batch of all processes: one process needs as many sequences at a time
    one = train(*settings, "--training.local_batch_size", 4, "--job.dump_folder", tmp_path / "1")
    two = run(*settings, "--training.local_batch_size", 2, "--job.dump_folder", tmp_path / "2", NGPU="2")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert records(tmp_path / "2") == pytest.approx(records(tmp_path / "1"), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.stepz", "5"], "unknown key --training.stepz; did you mean training.steps?"),
        (["--model.peer.product_key_dim", "128", "100"], "its product 12,800 must equal model.peer.num_experts"),
        (["--data.sources.0.path", "no/such/file.jsonl"], "data.sources[0].path = no/such/file.jsonl"),
        (["--model.tokenizer_path", "README.md"], "model.tokenizer_path = README.md"),
        (["--training.global_batch_size", "9"], "must be a multiple of training.local_batch_size"),
        (["--compile.enable", "maybe"], "compile.enable = 'maybe': must be true or false"),
    ],
)
def test_bad_input_ends_with_one_clear_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = train(*DEBUG, "--job.dump_folder", tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    settings = [*TINY, "--training.steps", 2, "--job.dump_folder", tmp_path]
    assert train(*settings).returncode == 0
    data = next((tmp_path / "checkpoint" / "step-2").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = train(*settings)
    assert done.returncode == 2
    assert "step-2" in done.stderr and "CRC-32" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_job_and_says_what_broke(tmp_path: Path) -> None:
    settings = [*TINY, "--training.steps", 50, "--optimizer.lr", "1e30", "--lr_scheduler.warmup_steps", 0]
    done = train(*settings, "--training.max_norm", 0, "--job.dump_folder", tmp_path)
    assert done.returncode == 3
    assert "gradient norm = " in done.stderr and "parameters no longer finite: " in done.stderr
    assert "try a lower optimizer.lr" in done.stderr and "Traceback" not in done.stderr
    last = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["alert"] == "loss or gradient is not finite" and last["text"] in done.stderr
    assert not (tmp_path / "checkpoint" / "step-50").exists()


def test_print_config_gives_toml_that_reproduces_the_job(tmp_path: Path) -> None:
    first = run(*DEBUG, "--training.steps", "7", "--job.print_config")
    copy = tmp_path / "copy.toml"
    copy.write_text(first.stdout, encoding="utf-8")
    second = train("--job.config_file", copy, "--job.print_config")
    assert first.returncode == second.returncode == 0
    assert "steps = 7" in first.stdout
    assert second.stdout == first.stdout.replace(DEBUG[1], str(copy))


def test_a_job_in_any_script_trains_and_resumes_where_the_terminal_lacks_its_characters(tmp_path: Path) -> None:
    job = tmp_path / "日本.toml"
    text = (ROOT / DEBUG[1]).read_text(encoding="utf-8").replace('description = "', 'description = "日本 – ')
    job.write_text(text, encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}
    settings = ["--job.config_file", "日本.toml", *TINY[2:], "--job.dump_folder", "out"]
    for steps in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "titan_peer.train", *settings, "--training.steps", str(steps)],
            cwd=in_folder(tmp_path),
            env={**os.environ, **locale, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert "日本 – debug model" in (tmp_path / "out" / "config.toml").read_text(encoding="utf-8")
    assert set(records(tmp_path / "out")) == {1, 2}


def in_folder(folder: Path) -> Path:
    """The folder, with what the debug job reads by relative paths."""
    if not (folder / "assets").exists():
        (folder / "assets").symlink_to(ROOT / "assets")
    return folder
