"""A sign of life while nothing is reported: which step the job is at and for how long."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger("titan_peer")


class Heartbeat:
    """Logs a line whenever `beat` has not been called for another `seconds`; a thread that ends with `close`.

    A step that compiles takes minutes, and one that waits for a lost process looks the same from outside: the line says
    what has been going on since when.

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

    def beat(self, doing: str) -> None:
        """Something has begun, and so what was before has ended."""
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        said_at = self._since
        while not self._closed.wait(max(max(said_at, self._since) + self.seconds - time.monotonic(), 0.05)):
            now = time.monotonic()
            if now - max(said_at, self._since) >= self.seconds:
                logger.info("alive: %s, for %.0f s so far", self._doing, now - self._since)
                said_at = now

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
