"""Memory that a step frees is there for the next."""

from __future__ import annotations

import subprocess
import sys

# Five tensors of 16 MiB, as a layer's activations; page faults while they are made and freed ten times more.
SCRIPT = """
import resource, sys, torch
from titan_peer.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    tensors = [torch.zeros(4, 2**20) for _ in range(5)]

step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_does_not_fault_in_its_memory_again() -> None:
    as_it_is, kept = page_faults("as it is"), page_faults("kept")
    assert as_it_is > 10_000  # of 204,800 pages; how many depends on the order of calls
    assert kept < as_it_is // 20
