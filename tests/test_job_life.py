"""A job from its start to its end: its files, messages and exit status, also in a folder that was used before."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from small_jobs import SMALL

from titan_peer import train, trainer
from titan_peer.checkpoint.folder import saved_steps
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.dump_folder import JobLock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def as_at_a_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(folder: Path, *arguments: object) -> int:
    return train.main([*SMALL, "--job.dump_folder", str(folder), *map(str, arguments)])


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def steps(file: Path) -> list[int]:
    return [record["step"] for record in records(file) if "loss" in record]


def test_a_start_in_a_used_folder_sets_aside_what_was_reported(tmp_path: Path) -> None:
    old: list[dict[str, bytes]] = []
    for n, description in enumerate(("first", "second", "third")):
        settings = ["--training.steps", 1, "--checkpoint.enable", "false", "--job.description", description]
        assert run(tmp_path, *settings) == 0
        for name in ("expert_usage/expert_usage.jsonl", "tensorboard/events", "wandb_run_id", "evaluation.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(description, encoding="utf-8")
        files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".job.lock"]
        content = {str(p.relative_to(tmp_path)): p.read_bytes() for p in files}
        old.append({name: found for name, found in content.items() if not name.startswith("superseded")})
        assert {"metrics.jsonl", "config.toml", "loss.png", "wandb_run_id"} <= old[n].keys()
        assert f'description = "{description}"'.encode() in old[n]["config.toml"]
        aside = [f"superseded{'' if i == 0 else f'-{i + 1}'}/" for i in range(n)]
        assert content == old[n] | {folder + name: old[i][name] for i, folder in enumerate(aside) for name in old[i]}
        assert steps(tmp_path / "metrics.jsonl") == [1]


def test_going_back_to_an_older_checkpoint_keeps_the_records_of_what_came_after(tmp_path: Path) -> None:
    assert run(tmp_path, "--training.steps", 4) == 0
    first = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(tmp_path, "--training.steps", 4, "--checkpoint.load_step", 2, "--optimizer.lr", "1e-4") == 0
    assert (tmp_path / "superseded" / "metrics.jsonl").read_bytes() == first
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert records(tmp_path / "metrics.jsonl")[3]["lr"] != records(tmp_path / "superseded" / "metrics.jsonl")[3]["lr"]


def test_a_job_that_starts_from_another_ones_step_does_not_adopt_the_records_in_its_folder(tmp_path: Path) -> None:
    assert run(tmp_path / "a", "--training.steps", 2) == 0
    assert run(tmp_path / "b", "--training.steps", 2, "--checkpoint.enable", "false") == 0
    start = ["--checkpoint.initial_load_path", tmp_path / "a/checkpoint/step-2", "--training.steps", 3]
    assert run(tmp_path / "b", *start, "--checkpoint.initial_load_model_only", "false") == 0
    assert steps(tmp_path / "b" / "metrics.jsonl") == [3]
    assert steps(tmp_path / "b" / "superseded" / "metrics.jsonl") == [1, 2]


def test_a_configuration_written_by_hand_in_the_folder_is_kept(tmp_path: Path) -> None:
    mine = "# mine\n" + load_config(SMALL).to_toml()
    (tmp_path / "config.toml").write_text(mine, encoding="utf-8")
    job = [
        "--job.config_file",
        str(tmp_path / "config.toml"),
        "--job.dump_folder",
        str(tmp_path),
        "--training.steps",
        "1",
    ]
    assert train.main(job) == 0
    assert (tmp_path / "config.toml.superseded").read_text(encoding="utf-8") == mine


def test_nothing_to_do_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path, "--training.steps", 2) == 0
    saved = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoint").rglob("*")}
    config = (tmp_path / "config.toml").read_bytes()
    for fewer in (2, 1):
        with caplog.at_level(logging.INFO, "titan_peer"):
            assert run(tmp_path, "--training.steps", fewer) == 0
        assert f"nothing to do: the checkpoint is of step 2, and training.steps = {fewer}" in caplog.text
        assert "steps 3 to" not in caplog.text
        caplog.clear()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoint").rglob("*")} == saved
    assert (tmp_path / "config.toml").read_bytes() == config  # of the job that trained
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_the_last_step_is_logged_when_the_data_end_early(tmp_path: Path) -> None:
    text = "".join(json.dumps({"text": f"A short document, number {i}."}) + "\n" for i in range(100))
    (tmp_path / "few.jsonl").write_text(text, encoding="utf-8")
    data = ["--data.sources.0.path", tmp_path / "few.jsonl", "--data.sources.0.max_epochs", 1, "--training.steps", 1000]
    assert run(tmp_path / "out", *data, "--metrics.log_freq", 1000) == 0
    last = saved_steps(tmp_path / "out" / "checkpoint")[-1]
    assert last > 1 and steps(tmp_path / "out" / "metrics.jsonl") == [1, last]


def test_a_batch_with_nothing_to_learn_is_not_taken_for_the_end_of_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [
        *(f"A short document, number {i}." for i in range(8)),
        *("a" * 40),
        *(f"Number {i} again." for i in range(8)),
    ]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "some.jsonl").write_text(lines, encoding="utf-8")
    data = ["--data.sources.0.path", tmp_path / "some.jsonl", "--data.sources.0.max_epochs", 1, "--data.packing", "pad"]
    data += ["--data.add_bos", "false", "--data.add_eos", "false", "--data.shuffle", "false", "--data.num_streams", 1]
    assert run(tmp_path / "out", *data, "--training.local_batch_size", 4, "--training.steps", 1000) == 0
    assert steps(tmp_path / "out" / "metrics.jsonl") == [1, 2, 3, 4]
    assert "step 3: a batch without a token to predict is skipped" in caplog.text


def test_the_last_step_is_logged_when_the_job_is_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.Trainer.train_step

    def told_in_step_3(self, batches):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", told_in_step_3)
    assert run(tmp_path, "--metrics.log_freq", 1000) == 0
    assert steps(tmp_path / "metrics.jsonl") == [1, 3]
    assert (tmp_path / "checkpoint" / "step-3").is_dir()


def test_a_second_job_in_the_folder_is_refused_before_it_writes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = "import sys; from pathlib import Path; from titan_peer.common.folder_lock import FolderLock\n"
    holder += "lock = FolderLock(Path(sys.argv[1]), 0); print('has it', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        assert run(tmp_path, "--job.lock_wait_seconds", 0) == 2
        assert f"process {other.pid} on " in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == [".job.lock"]
        other.stdin.close()
    assert run(tmp_path, "--job.lock_wait_seconds", 0, "--training.steps", 1) == 0


def test_a_second_job_with_the_same_folder_of_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    holder = "import sys; from titan_peer.config.parse import load_config; from titan_peer.dump_folder import JobLock\n"
    holder += "lock = JobLock(load_config(sys.argv[1:])); print('has it', flush=True); sys.stdin.read()"
    folders = ["--checkpoint.folder", str(shared), "--job.dump_folder"]
    command = [sys.executable, "-c", holder, *SMALL, *folders, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        assert run(tmp_path / "b", *folders[:2], "--job.lock_wait_seconds", 0) == 2
        said = capsys.readouterr().err
        assert f"checkpoint.folder = {shared}: process {other.pid} on " in said and "another checkpoint.folder" in said
        other.stdin.close()
    assert run(tmp_path / "b", *folders[:2], "--job.lock_wait_seconds", 0, "--training.steps", 1) == 0
    assert saved_steps(shared) == [1]


def test_a_folder_that_cannot_be_locked_is_named_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert run(tmp_path / "a", "--checkpoint.folder", tmp_path / "file/checkpoints") == 2
    said = f"error: checkpoint.folder = {tmp_path}/file/checkpoints: cannot be written to: Not a directory\n"
    assert capsys.readouterr().err == said
    assert run(tmp_path / "file/dump") == 2
    said = f"error: job.dump_folder = {tmp_path}/file/dump: cannot be written to: Not a directory\n"
    assert capsys.readouterr().err == said


def test_a_job_whose_folder_was_taken_over_stops_writing(tmp_path: Path) -> None:
    config = load_config([*SMALL, "--job.dump_folder", str(tmp_path)])
    lock = JobLock(config)
    job = trainer.Trainer(config, init_world(config.parallelism), lock)
    lock._locks[0]._lost_to = "process 7 on elsewhere"
    with pytest.raises(UserError, match="process 7 on elsewhere has taken it over"):
        job.train()
    assert not list((tmp_path / "checkpoint").glob("step-*"))
    lock.release()


def test_one_step_learns(tmp_path: Path) -> None:
    assert run(tmp_path, "--training.steps", 1, "--lr_scheduler.warmup_steps", 0, "--lr_scheduler.decay_ratio", 1) == 0
    (record,) = records(tmp_path / "metrics.jsonl")
    assert record["lr"] == pytest.approx(6e-3)  # of the debug job, not 0


def test_a_schedule_that_is_cut_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "titan_peer"):
        assert run(tmp_path, "--training.steps", 2, "--lr_scheduler.warmup_steps", 10) == 0
    assert "warning: lr_scheduler.warmup_steps = 10 is more than training.steps = 2" in caplog.text


def test_a_printed_job_trains(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    job = ["--job.dump_folder", str(tmp_path / "out"), "--training.steps", "1", "--job.description", "日本 ünïcode"]
    assert train.main([*SMALL, *job, "--job.print_config"]) == 0
    printed = tmp_path / "my.toml"
    printed.write_bytes(capfdbinary.readouterr().out)
    assert tomllib.loads(printed.read_text(encoding="utf-8"))["job"]["description"] == "日本 ünïcode"
    assert train.main(["--job.config_file", str(printed)]) == 0
    assert steps(tmp_path / "out" / "metrics.jsonl") == [1]


def test_a_file_that_only_prints_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[job]\nprint_config = true\n", encoding="utf-8")
    with pytest.raises(UserError, match="print_config = true: is for the command line only"):
        load_config(["--job.config_file", str(tmp_path / "job.toml")])


def test_no_arguments_print_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([]) == 2
    assert "usage: titan-peer train --job.config_file FILE" in capsys.readouterr().err
