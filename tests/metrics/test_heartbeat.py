"""Signs of life: the messages while no step ends, and which process is named as the slowest."""

from __future__ import annotations

import logging
import time

import pytest

from titan_peer.metrics.heartbeat import Heartbeat


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of this test's heartbeat; jobs that other tests have made and left may still have theirs."""
    return [message for message in caplog.messages if message.startswith("alive: step")]


def test_heartbeat_speaks_only_while_nothing_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="titan_peer")
    heartbeat = Heartbeat(0.4)
    try:
        for step in range(6):
            heartbeat.begin(f"step {step}")
            time.sleep(0.1)
        assert not said(caplog)
        heartbeat.begin("step 6")
        time.sleep(1.0)
        assert [m.partition(",")[0] for m in said(caplog)] == ["alive: step 6"] * 2
    finally:
        heartbeat.close()
    before = said(caplog)
    time.sleep(0.6)
    assert said(caplog) == before


def test_heartbeat_of_zero_seconds_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="titan_peer")
    heartbeat = Heartbeat(0)
    time.sleep(0.2)
    heartbeat.close()
    assert not caplog.messages
