"""Every command shown in the README and docs/ is one that the programs accept."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from titan_peer import cli
from titan_peer.config import leaf_keys, load_config
from titan_peer.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line of the fenced blocks that starts one of our programs."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|", line):
                    part = re.sub(r"^\$ ", "", part.strip())
                    if re.match(r"([A-Z_]+=\S+ )*(\./run_train\.sh|titan-peer) ", part):
                        found.append((page.name, part))
    return found


@cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "titan_peer.cli", *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    return done.stdout


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_command_in_the_docs_is_accepted(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [w for w in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", w)]
    program, *arguments = words
    if arguments == ["--help"] or "..." in arguments:
        return
    if program == "./run_train.sh" or arguments[:1] == ["train"]:
        load_config(arguments if program == "./run_train.sh" else arguments[1:])
        return
    name = max((n for n in cli.COMMANDS if " ".join(arguments).startswith(n)), key=len)
    keys = {f"--{key}" for key, _, _ in leaf_keys()}  # of the job, which some commands take besides their own flags
    flags = [w.partition("=")[0] for w in arguments if w.startswith("--")]
    flags = [flag for flag in flags if not (flag in keys and "--job.config_file" in help_of(name))]
    missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", help_of(name))]
    assert not missing, f"{page}: {command}: titan-peer {name} has no {', '.join(missing)}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_python_in_the_docs_runs(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path)


def test_the_docs_show_commands() -> None:
    assert len(commands()) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_bundled_tokenizer_is_the_one_the_jobs_name() -> None:
    assert load_tokenizer(str(ROOT / "assets/tokenizer")).vocab_size == 4096
