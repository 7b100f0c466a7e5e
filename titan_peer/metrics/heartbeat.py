"""A sign of life while nothing else is reported: what the job is doing, and for how long."""

from __future__ import annotations

import logging
import threading
import time

from titan_peer.metrics.callback import Callback, Run, RunEnd

logger = logging.getLogger("titan_peer")


class Heartbeat(Callback):
    """Logs a line for every `seconds` that pass without a call of `begin`, from a thread that ends with `close`.

    A step that compiles takes minutes, and a step that waits for a lost process looks the same from outside. The line
    says what the job is doing, and for how long.

    Args:
        seconds: 0 never logs.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._doing, self._since = "starting", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        if seconds:
            self._thread.start()

    @classmethod
    def of(cls, run: Run) -> Heartbeat | None:
        seconds = run.config.metrics.heartbeat_seconds
        return cls(seconds) if seconds and run.world.is_first else None

    def begin(self, doing: str) -> None:
        """The job now does `doing`; what it did before has ended."""
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        said_at = self._since
        while not self._closed.wait(max(max(said_at, self._since) + self.seconds - time.monotonic(), 0.05)):
            now = time.monotonic()
            if now - max(said_at, self._since) >= self.seconds:
                logger.info("alive: %s, for %.0f s so far", self._doing, now - self._since)
                said_at = now

    def end(self, end: RunEnd) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
