"""Every command shown in the README and docs/ runs as it is written, in the order of its page.

By default some quick commands run, and the arguments of all of them are parsed by the programs that they name;
`pytest -m slow tests/test_docs.py` runs all.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from docs_commands import PAGES, PROGRAM, ROOT, Outcome, Reader, Step, blocks, job_arguments, steps

from titan_peer.analysis.model_size import model_size
from titan_peer.commands import main as cli
from titan_peer.config.parse import leaf_keys, load_config
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.model import Transformer

ALL = [step for page in PAGES for step in steps(page)]

# --------------------------------------------------------------------------------------------------------------------
# Commands that cannot run here, the reason, and the check that replaces them

Check = Callable[[Reader, Step], Outcome]


def instead(old: str, new: str) -> Check:
    """Run the command with a part of it replaced."""
    return lambda reader, step: reader.run(Step(step.page, re.sub(old, new, step.text)))


def extras_exist(reader: Reader, step: Step) -> Outcome:
    """The extras of this package that pip should install exist."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"].keys()
    asked = [name for group in re.findall(r"\[([\w,-]+)\]", step.text) for name in group.split(",")]
    return Outcome(set(asked) <= known, f"asked for {asked}, there are {list(known)}")


def named_tests_are_there(reader: Reader, step: Step) -> Outcome:
    missing = [word for word in step.text.split() if "/" in word and not (ROOT / word).exists()]
    return Outcome(not missing, f"not there: {missing}")


def job_is_accepted(reader: Reader, step: Step) -> Outcome:
    load_config(shlex.split(" ".join(job_arguments(step.text))))
    return Outcome(True, "")


def says_that_it_needs_a_gpu(reader: Reader, step: Step) -> Outcome:
    found = reader.run(step)
    return Outcome("needs a CUDA device" in found.output, found.output)


def its_help(reader: Reader, step: Step) -> Outcome:
    return reader.run(Step(step.page, re.sub(r"(\.py).*", r"\1 --help", step.text)))


class Reason(NamedTuple):
    commands: str
    """A pattern that is searched for."""
    why: str
    check: Check


def whole_dry_run(reader: Reader, step: Step) -> Outcome:
    """The page's own way to check such a job: one process acts as rank 0 of all."""
    text = re.sub(r"NODE_RANK=\d+ |RDZV_ENDPOINT=\S+ ", "", step.text)
    return reader.run(Step(step.page, f"{text} --comm.mode fake_backend"))


CANNOT_RUN = [
    Reason(r"-m venv|uv venv|^\. \.venv", "makes an environment for the packages below", lambda *_: Outcome(True, "")),
    Reason(r"pip install wheels", "needs wheels that take hours to build", lambda *_: Outcome(True, "")),
    Reason(r"pip install", "downloads packages, several GB where there is no GPU", extras_exist),
    Reason(r"^pytest", "runs these tests", named_tests_are_there),
    Reason(r"^scripts/check\.sh", "runs these tests", named_tests_are_there),
    Reason(r"^PYTHON_VERSION.*build_from_source", "builds PyTorch for hours, with CUDA", instead("$", " --dry-run")),
    Reason(r"^NNODES=2 NODE_RANK", "needs two machines of eight GPUs", whole_dry_run),
    Reason(r"TORCH_FR_BUFFER_SIZE", "needs eight GPUs", whole_dry_run),
    Reason(r"^sbatch", "needs SLURM", job_is_accepted),
    Reason(r"titan-peer tune", "needs a GPU", says_that_it_needs_a_gpu),
    Reason(r"^WANDB_PROJECT.*enable_wandb$", "needs an account", job_is_accepted),
    Reason(r"^wandb ", "needs an account", lambda *_: Outcome(True, "")),
    Reason(
        r"outputs/peer_1m\b",
        "needs a trained model of a million experts: 9 GB of memory, days of a CPU",
        instead(r"outputs/peer_1m\b(/checkpoint/step-\d+)?", "outputs/debug_model"),
    ),
    Reason(
        r"HuggingFaceFW/fineweb-edu",
        "reads 100,000 documents over the network",
        instead(r"HuggingFaceFW/fineweb-edu --source.subset sample-10BT", "assets/sample_text/train.jsonl"),
    ),
    Reason(
        r"hellaswag",
        "downloads its data",
        instead("hellaswag", "titan_peer/evaluation/lm_eval_tasks/sample_text_copy.yaml"),
    ),
    Reason(
        r"--source\.path HuggingFaceFW/",
        "reads a dataset over the network",
        instead(r"HuggingFaceFW/\S+ --source\.subset \S+", "assets/sample_text/train.jsonl"),
    ),
    Reason(r"python scripts/fetch_corpora", "downloads packages of a Linux distribution", its_help),
    Reason(r"python benchmarks/", "measures for minutes to hours", its_help),
]


def reason_not_to_run(step: Step) -> Reason | None:
    if step.text.startswith("titan-peer tune") and torch.cuda.is_available():
        return None
    return next((reason for reason in CANNOT_RUN if re.search(reason.commands, step.text)), None)


def follow(reader: Reader, step: Step) -> Outcome:
    """Run a step, or the check that replaces it."""
    reason = reason_not_to_run(step)
    return reader.run(step) if reason is None else reason.check(reader, step)


# --------------------------------------------------------------------------------------------------------------------
# A reader's session

FIRST_JOB = "./run_train.sh --job.config_file train_configs/debug_model.toml"
"""The README's first job, whose model the pages use."""
QUICK_JOB = next(
    (step.text for step in ALL if step.page == "README.md" and step.trains and "--compile.enable false" in step.text),
    "",
)
QUICK = ["titan-peer generate --checkpoint", "titan-peer data inspect", "titan-peer ablate"]


@pytest.fixture(scope="module")
def quick_reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader who has run the README's quick job; its model replaces that of the first job."""
    reader = Reader(tmp_path_factory.mktemp("quick"))
    done = reader.run(Step("README.md", QUICK_JOB))
    assert done.ok, done.output
    made = re.search(r"--job\.dump_folder (\S+)", QUICK_JOB)
    assert made, "the quick job has a folder of its own"
    (reader.folder / "outputs/debug_model").symlink_to(reader.folder / made[1])
    return reader


@pytest.mark.parametrize("start", QUICK)
def test_a_quick_command_runs_as_written(start: str, quick_reader: Reader) -> None:
    step = next(s for s in ALL if s.text.startswith(start) and ("--dry_run" in s.text or "ablate" not in start))
    found = quick_reader.run(step)
    assert found.ok, f"{step.text}\n{found.output}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader who has run the README's first job."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    done = reader.run(Step("README.md", FIRST_JOB))
    assert done.ok, done.output
    return reader


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if steps(page)], ids=lambda page: page.name)
def test_all_commands_of_a_page_run_as_written(page: Path, reader: Reader) -> None:
    failed = []
    for step in steps(page):
        found = follow(reader, step)
        if not found.ok:
            failed.append(f"$ {step.text}\n{found.output[-3000:]}")
    shown = [text for language, text in blocks(page) if language == "text" and text.startswith("dry run of")]
    printed = [reader.outcomes[step.text].output for step in steps(page) if step.text in reader.outcomes]
    failed += [f"no command prints\n{text}" for text in shown if not any(text in output for output in printed)]
    assert not failed, f"{len(failed)} of {len(steps(page))}:\n" + "\n\n".join(failed)


def test_the_first_job_of_the_readme_is_the_one_whose_model_the_pages_use() -> None:
    assert FIRST_JOB in [step.text for step in steps(ROOT / "README.md")]


def test_every_reason_not_to_run_a_command_still_has_one() -> None:
    texts = [step.text for step in ALL]
    unused = [reason.commands for reason in CANNOT_RUN if not any(re.search(reason.commands, text) for text in texts)]
    assert not unused


# --------------------------------------------------------------------------------------------------------------------
# Without running


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_line_of_a_block_without_a_language_is_a_command(page: Path) -> None:
    known = {"bash", "sh", "console", "python", "text", "toml", "json", "mermaid"}
    assert {language for language, _ in blocks(page)} <= known
    unknown = [step.text for step in steps(page) if step.language == "bash" and not PROGRAM.match(step.text)]
    assert not unknown, "say of which language the block is, or let PROGRAM know the command"


@cache
def help_of(command: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    return shown.getvalue()


@pytest.mark.parametrize(
    "step", dict.fromkeys(s for s in ALL if PROGRAM.match(s.text)), ids=lambda s: f"{s.page}: {s.text}"
)
def test_a_command_in_the_docs_is_accepted(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = [w for w in shlex.split(step.text, comments=True) if not re.match(r"[A-Z_]+=", w)]
    if program not in ("./run_train.sh", "titan-peer") or arguments[-1:] in (["--help"], ["--version"]):
        return
    if program == "./run_train.sh" or arguments[:1] == ["train"]:
        load_config(arguments if program == "./run_train.sh" else arguments[1:])
        return
    name = max((n for n in cli.COMMANDS if " ".join(arguments).startswith(n)), key=len)
    keys = {f"--{key}" for key, _, _ in leaf_keys()}  # of the job, which some commands take besides their own flags
    flags = [w.partition("=")[0] for w in arguments if w.startswith("--")]
    flags = [flag for flag in flags if not (flag in keys and "run_train.sh" in help_of(name))]
    missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", help_of(name))]
    missing = [flag for flag in missing if not re.fullmatch(r"--data\.sources\.\d+\.\w+", flag)]
    assert not missing, f"titan-peer {name} has no {', '.join(missing)}"


NEEDS_EARLIER_COMMANDS = ("from_pretrained",)
"""Words of Python code in the pages that runs only after the page's commands."""


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(s.language == "python" for s in steps(p))], ids=lambda p: p.name
)
def test_python_in_the_docs_runs(page: Path, tmp_path: Path) -> None:
    for step in steps(page):
        if step.language == "python" and not any(word in step.text for word in NEEDS_EARLIER_COMMANDS):
            subprocess.run([sys.executable, "-c", step.text], check=True, cwd=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_bundled_tokenizer_is_the_one_the_jobs_name() -> None:
    assert load_tokenizer(str(ROOT / "assets/tokenizer")).vocab_size == 4096


def test_parameter_counts_in_the_readme_are_those_of_the_jobs() -> None:
    rows = re.findall(
        r"^\| `(train_configs/\w+\.toml)`.*?\| (.*?) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    counts = {job: re.findall(r"([\d.]+) M (parameters|active)", text) for job, text in rows}
    counts = {job: found for job, found in counts.items() if found}
    assert len(counts) == 2
    for job, found in counts.items():
        config = load_config(["--job.config_file", str(ROOT / job)])
        config.model.vocab_size = load_tokenizer(str(ROOT / "assets/tokenizer")).vocab_size
        with torch.device("meta"):
            size = model_size(Transformer(config.model), config.training.seq_len)
        actual = {"parameters": size.total_parameters, "active": size.active_parameters}
        for number, kind in found:
            digits = len(number.partition(".")[2])
            assert number == f"{actual[kind] / 1e6:.{digits}f}", f"{job}: {kind}"


def test_the_speeds_in_the_readme_are_those_of_the_measured_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    link = re.search(r"\[table\]\((benchmarks/results/\S+-peer-layer-cpu\.md)\), \[plot\]", readme)
    assert link
    measured: dict[tuple[str, str], list[str]] = {}
    for line in (ROOT / link[1]).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9:
            measured[cells[0], cells[1]] = cells
    rows = re.findall(
        r"^\| ([\d,]+) \| ([\d,]+) ms \| (\d+) ms \| ([\d.]+)x \| (\S+) / (\S+) \| (\d+) ms, (\S+) GB \|$", readme, re.M
    )
    assert len(rows) == 4
    for experts, theirs, ours, ratio, their_peak, our_peak, small, small_peak in rows:
        other = measured[experts, "PEER-pytorch"]
        rowwise = measured[experts, "titan_peer, row-wise AdamW"]
        compact = measured[experts, "titan_peer, bf16 first moment, one second moment a row"]
        assert int(theirs.replace(",", "")) == pytest.approx(float(other[5]), abs=0.51)
        assert int(ours) == pytest.approx(float(rowwise[5]), abs=0.51)
        assert float(ratio) == pytest.approx(float(rowwise[6].rstrip("x")), abs=0.051)
        assert int(small) == pytest.approx(float(compact[5]), abs=0.51)
        assert (their_peak, our_peak, small_peak) == (other[7], rowwise[7], compact[7])
