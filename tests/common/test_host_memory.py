"""Memory that a step frees is kept for the next step; tables use huge pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from titan_peer.common.host_memory import prefer_huge_pages

# Five blocks of 16 MiB, like a layer's activations; page faults while they are allocated and freed ten more times.
SCRIPT = """
import ctypes, resource, sys
from titan_peer.common.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 2**24

def step():
    pieces = [libc.malloc(ctypes.c_size_t(size)) for _ in range(5)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    for piece in pieces[::-1]:
        libc.free(ctypes.c_void_p(piece))

for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=400, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_does_not_fault_in_its_memory_again() -> None:
    pages = 10 * 5 * 2**24 // 4096
    assert page_faults("as it is") > pages // 2
    assert page_faults("kept") < pages // 100


def advice_at(address: int) -> set[str]:
    """The flags of the memory mapping that contains this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError(f"no mapping holds {address:x}")


def test_a_large_table_is_given_huge_pages_and_a_small_tensor_is_left_alone() -> None:
    table = torch.empty(2**22)  # 16 MiB
    system_has_them = Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert prefer_huge_pages(table) == system_has_them
    assert ("hg" in advice_at(table.data_ptr() + table.nbytes // 2)) == system_has_them
    assert not prefer_huge_pages(torch.empty(1000))
    assert not prefer_huge_pages(torch.empty(2**22, device="meta"))
