"""Signs of life: the messages while no step ends, and which process is named as the slowest."""

from __future__ import annotations

import logging
import time

import pytest

from titan_peer.metrics.heartbeat import Heartbeat


def test_heartbeat_speaks_only_while_nothing_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="titan_peer")
    heartbeat = Heartbeat(0.4)
    try:
        for step in range(6):
            heartbeat.begin(f"step {step}")
            time.sleep(0.1)
        assert not caplog.messages
        heartbeat.begin("step 6")
        time.sleep(1.0)
        assert [m.partition(",")[0] for m in caplog.messages] == ["alive: step 6"] * 2
    finally:
        heartbeat.close()
    said = len(caplog.messages)
    time.sleep(0.6)
    assert len(caplog.messages) == said


def test_heartbeat_of_zero_seconds_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="titan_peer")
    heartbeat = Heartbeat(0)
    time.sleep(0.2)
    heartbeat.close()
    assert not caplog.messages
