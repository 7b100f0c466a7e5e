"""Compiles the C++ kernels of this folder on first use and loads them.

The library is cached under a hash of the sources, the compiler and the processor's features, in TITAN_PEER_CACHE_DIR or
the user's cache folder. It is written under another name and then renamed, so several processes may build at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
THREADS = ("-fopenmp", "-fopenmp-simd")  # the second is single-threaded, for Apple's compiler, which has no OpenMP
# No -ffast-math: it would make every later float operation of the process flush subnormals.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-shared",
    "-fPIC",
)


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels and tuning results are kept."""
    root = os.environ.get("TITAN_PEER_CACHE_DIR")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_peer"


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise BuildError("no C++ compiler (g++, clang++ or $CXX) was found")
    return compiler


def _flags() -> tuple[str, ...]:
    if platform.machine() in ("x86_64", "AMD64"):
        return (*FLAGS, "-march=native", "-mprefer-vector-width=512")
    return (*FLAGS, "-mcpu=native")


def _build(target: Path, compiler: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        for threads in THREADS:
            command = [compiler, *_flags(), threads, "-o", str(fresh), *map(str, SOURCES)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
            if done.returncode == 0:
                break
        else:
            raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
        fresh.replace(target)


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        BuildError: there is no compiler, it failed, or the cache folder cannot be written to.
    """
    compiler = _compiler()
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
    texts = [path.read_text(encoding="utf-8") for path in SOURCES + HEADERS]
    recipe = "\n".join([*texts, version, *THREADS, *_flags(), platform.machine(), _processor_features()])
    target = cache_folder() / f"kernels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _build(target, compiler)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"{target}: {error}") from error
