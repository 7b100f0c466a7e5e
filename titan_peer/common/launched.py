"""What the launcher tells a process of its job. Without torch, so that the first process alone can answer a mistake in
a key."""

from __future__ import annotations

import os


def launched_as() -> tuple[int, int]:
    """The rank of this process and the number of processes, as torchrun says in the environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
