"""Reads the file of an offline Weights & Biases run without its service: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32768
_FULL, _LAST = 1, 4  # kinds of log entries that end a record


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        left_in_block = _BLOCK - place % _BLOCK
        if left_in_block < _HEADER:  # too short for an entry's header: padding
            place += left_in_block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_records(path: Path, kind: str) -> list[Any]:
    """The records of a kind ("history", "alert", "artifact", "run", ...) in the run-ID.wandb file of a finished run."""
    deadline = time.monotonic() + 60
    while True:  # W&B's own process writes the file, and may do so after the run's process has gone on
        records = list(_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > deadline:
            return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]
        time.sleep(0.1)


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows logged."""
    rows = []
    for history in wandb_records(path, "history"):
        row: dict[str, Any] = {}
        for item in history.item:
            *outer, last = list(item.nested_key) or [item.key]
            place = row
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = json.loads(item.value_json)
        rows.append(row)
    return rows
