"""Calls from many threads, answered in batches by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class RequestBatcher(Generic[Request, Answer]):
    """A function of one request that many threads call, and whose calls are answered in batches.

    A model call costs about the same for one sequence as for a few, so a batch waits briefly for further requests.

    Args:
        answer_all: answers a list of requests, in order; always called from the same thread.
        batch_size: the most requests per call.
        wait_seconds: how long an incomplete batch waits for another request.
    """

    def __init__(
        self, answer_all: Callable[[list[Request]], list[Answer]], batch_size: int, wait_seconds: float = 0.02
    ) -> None:
        self._answer_all, self._batch_size, self._wait_seconds = answer_all, batch_size, wait_seconds
        self._queue: queue.Queue[tuple[Request, Future[Answer]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, name="request-batcher", daemon=True)
        self._thread.start()

    def __call__(self, request: Request) -> Answer:
        """Wait for the answer; raises the error that `answer_all` raised for the batch."""
        future: Future[Answer] = Future()
        self._queue.put((request, future))
        return future.result()

    def close(self) -> None:
        """Answer the waiting requests, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        closing = False
        while not closing:
            first = self._queue.get()
            if first is None:
                return
            batch = [first]
            while len(batch) < self._batch_size:
                try:
                    following = self._queue.get(timeout=self._wait_seconds)
                except queue.Empty:
                    break
                if following is None:
                    closing = True
                    break
                batch.append(following)
            self._answer(batch)

    def _answer(self, batch: list[tuple[Request, Future[Answer]]]) -> None:
        try:
            answers = self._answer_all([request for request, _ in batch])
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
