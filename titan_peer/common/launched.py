"""What the launcher tells a process of its job. Without torch, so that the first process alone can answer a mistake in
a key."""

from __future__ import annotations

import os

from titan_peer.common.errors import UserError


def launched_as() -> tuple[int, int]:
    """The rank of this process and the number of processes, as torchrun says in the environment; (0, 1) without it.

    Raises:
        UserError: one of them is not a number.
    """
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} = {text}: must be a whole number, as torchrun sets it; or unset it for one process")
    return int(text)
