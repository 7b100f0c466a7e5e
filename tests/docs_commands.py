"""The commands of the README and docs/, and a reader who runs them page by page in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_VARIABLES = r"(?:[A-Z_]+=\S+ )*"
_OURS = r"\./run_train\.sh|titan-peer|scripts/\S+\.sh|python3? (?:-m titan_peer\S*|(?:scripts|benchmarks)/\S+\.py)"
_OTHERS = (
    r"tensorboard|wandb sync|oaieval|lm_eval|pytest|python3? -m venv|uv (?:venv|pip)|pip install|\. \.venv\S*|sbatch"
)
PROGRAM = re.compile(rf"{_VARIABLES}(?:{_OURS}|{_OTHERS})(?:\s|$)")
"""How a line that is a command begins."""

SERVERS = ("tensorboard",)
"""Commands that run until they are stopped."""


@dataclass(frozen=True)
class Step:
    """A command line, or a block of Python, of a page."""

    page: str
    text: str
    language: str = "bash"

    @property
    def trains(self) -> bool:
        """Whether the command makes optimizer steps."""
        exempt = ("--help", "fake_backend", "print_config")
        return "./run_train.sh" in self.text and not any(word in self.text for word in exempt)


@dataclass(frozen=True)
class Outcome:
    ok: bool
    output: str


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block and each command in the running text, in the order of the page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```|(?<!`)`([^`]+)`(?!`)", text, re.M | re.S):
        language, block, inline = match.groups()
        if inline is None:
            found.append((language or "bash", block))
        elif _is_whole_command(" ".join(inline.split())):
            found.append(("bash", " ".join(inline.split())))
    return found


def _is_whole_command(text: str) -> bool:
    """Whether code in the running text is a command, and not only its name or a part of it."""
    if not PROGRAM.match(text) or re.search(r"\.\.\.|[A-Z]{3,}(?![\w=])", text):
        return False
    return " --" in text or bool(re.match(r"python3? \S+\.py|wandb sync|pip |uv |sbatch |scripts/\S+ --", text))


def steps(page: Path) -> list[Step]:
    """The steps that a reader of the page runs, line by line."""
    found = []
    for language, text in blocks(page):
        if language == "python":
            found.append(Step(page.name, text, "python"))
        elif language in ("bash", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                command = re.sub(r"^\$ ", "", line.strip())
                if command and not command.startswith("#"):
                    found += [Step(page.name, part.strip()) for part in command.split("&&")]
    return found


@dataclass
class Reader:
    """Runs steps in a copy of the repository. Later steps find the files of earlier ones, and no step runs twice."""

    folder: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        program = self.folder / ".bin" / "titan-peer"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m titan_peer.commands.main "$@"\n', encoding="utf-8")
        program.chmod(0o755)

    def environment(self) -> dict[str, str]:
        cache = Path.home() / ".cache" / "titan_peer"
        return {
            "TITAN_PEER_CACHE_DIR": str(cache),  # to use the compiled kernels: HOME is changed below
            **os.environ,
            "HOME": str(self.folder / ".home"),
            "PATH": os.pathsep.join(
                [str(self.folder / ".bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
            ),
            "PYTHONPATH": str(self.folder),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "WANDB_SILENT": "true",
        }

    def run(self, step: Step, *, timeout: float = 1200) -> Outcome:
        """Run a step as it is written."""
        if step.text not in self.outcomes:
            self.outcomes[step.text] = self._run(step, timeout)
        return self.outcomes[step.text]

    def _run(self, step: Step, timeout: float) -> Outcome:
        (self.folder / ".home").mkdir(exist_ok=True)
        command = [sys.executable, "-c", step.text] if step.language == "python" else ["bash", "-c", step.text]
        is_server = step.text.startswith(SERVERS)
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, timed_out = process.communicate(timeout=20 if is_server else timeout)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, timed_out = process.communicate()[0], True
        text = output.decode(errors="replace")
        if is_server:
            return Outcome(timed_out, text)
        if timed_out:
            return Outcome(False, f"{text}\nnot done after {timeout:.0f} s")
        if step.trains and not re.search(r"step +\d+/\d+ +loss", text):
            return Outcome(False, f"{text}\nstatus {process.returncode}, but no step was trained")
        return Outcome(process.returncode == 0, f"{text}\nstatus {process.returncode}")


def job_arguments(command: str) -> Sequence[str]:
    """The keys of a job that a command line gives, without variables and program."""
    return re.sub(rf"^{_VARIABLES}(?:\./run_train\.sh|titan-peer train|sbatch .*?\.slurm) ?", "", command).split()
