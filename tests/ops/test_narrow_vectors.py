"""The C++ kernels as a processor without 512-bit vectors gets them: most laptops."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

RETRIEVE = """
import torch
from titan_peer.ops import cpu, reference
assert cpu.unavailable_reason() is None, cpu.unavailable_reason()
for T, H, sizes, k in [(37, 3, [1024, 515], 16), (1, 8, [300, 70], 32), (20, 2, [33, 40, 3], 5), (9, 2, [700], 1)]:
    queries, keys = torch.randn(T, H, 4 * len(sizes)), [torch.randn(H, n, 4) for n in sizes]
    values, _ = cpu.retrieve_forward(queries, keys, k)
    torch.testing.assert_close(values, reference.retrieve_forward(queries, keys, k)[0], rtol=1e-5, atol=1e-5)
"""


def test_retrieval_without_512_bit_vectors_equals_the_reference(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    narrow = "-mno-avx512f" if platform.machine() in ("x86_64", "AMD64") else ""
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++") or shutil.which("clang++")} "$@" {narrow}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TITAN_PEER_CACHE_DIR": str(tmp_path)}
    # compiling took minutes when the vectors were wider than the processor's
    done = subprocess.run(
        [sys.executable, "-c", RETRIEVE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("kernels-*.so"))
