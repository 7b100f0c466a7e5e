"""The C++ kernels, compiled as for processors and compilers other than those of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("g++") or shutil.which("clang++")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
WRAPPERS = {
    "most laptops: no 512-bit vectors": f'exec {COMPILER} "$@" {"-mno-avx512f" if IS_X86 else ""}',
    "Apple's compiler: no OpenMP": 'case " $* " in *" -fopenmp "*) exit 1;; esac\n' + f'exec {COMPILER} "$@"',
}

CHECK = """
import torch
from titan_peer.ops import cpu, reference
from titan_peer.ops.backends import backend_report
assert cpu.unavailable_reason() is None, cpu.unavailable_reason()
for T, H, sizes, k in [(37, 3, [1024, 515], 16), (1, 8, [300, 70], 32), (20, 2, [33, 40, 3], 5), (9, 2, [700], 1)]:
    queries, keys = torch.randn(T, H, 4 * len(sizes)), [torch.randn(H, n, 4) for n in sizes]
    values, _ = cpu.retrieve_forward(queries, keys, k)
    torch.testing.assert_close(values, reference.retrieve_forward(queries, keys, k)[0], rtol=1e-5, atol=1e-5)
x, gates, tables = torch.randn(7, 24), torch.rand(7, 5), [torch.randn(50, 2, 24) for _ in range(2)]
arguments = (x, torch.randint(50, (7, 5)), gates, *tables, "gelu")
torch.testing.assert_close(cpu.peer_forward(*arguments), reference.peer_forward(*arguments), rtol=1e-5, atol=1e-5)
print(backend_report(torch.device("cpu")))
"""


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_kernels_of_another_compiler_equal_the_reference(wrapper: str, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    # compiling takes minutes if the vectors are wider than the processor's; the limit is in seconds of a core, so
    # a busy machine does not matter
    compiler.write_text(f"#!/bin/sh\nulimit -t 60\n{WRAPPERS[wrapper]}\n", encoding="utf-8")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TITAN_PEER_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=600, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("kernels-*.so"))
    assert ("one thread" in done.stdout) == ("OpenMP" in wrapper)
