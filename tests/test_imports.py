"""A file imports only from the floors below its own (docs/architecture.md); the floors are in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package in `folder`."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from importlinter.cli import lint_imports_command; "
    code += "lint_imports_command(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "titan_peer", tmp_path / "titan_peer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_file_imports_from_the_floors_below():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("common/units.py", "def late():\n    import titan_peer.train\n", "titan_peer.common is not allowed to import"),
        (
            "inference/sampling.py",
            "from titan_peer.metrics import sinks\n",
            "titan_peer.inference is not allowed to import",
        ),
        ("data/records.py", "from titan_peer.data import loader\n", "no circles inside a room BROKEN"),
        ("attic/__init__.py", "", "attic"),
    ],
    ids=["upwards", "same floor", "circle", "room without a floor"],
)
def test_an_import_that_the_floors_forbid_fails(copy, file, line, said):
    path = copy / "titan_peer" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(line)
    done = lint(copy)
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr
