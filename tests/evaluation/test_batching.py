"""Requests from many threads are combined into batches."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from titan_peer.evaluation.batching import RequestBatcher


def test_every_caller_gets_its_own_answer_from_full_batches_of_one_thread():
    sizes, threads = [], set()

    def squares(requests):
        sizes.append(len(requests))
        threads.add(threading.get_ident())
        return [r * r for r in requests]

    batcher = RequestBatcher(squares, batch_size=8, wait_seconds=0.5)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(batcher, range(64))) == [r * r for r in range(64)]
    batcher.close()
    assert sizes == [8] * 8 and len(threads) == 1


def test_an_error_reaches_every_caller_of_the_batch_and_the_next_batch_works():
    def inverse(requests):
        return [1 / r for r in requests]

    batcher = RequestBatcher(inverse, batch_size=2, wait_seconds=0.5)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(batcher, r) for r in (1, 0)]
        assert all(isinstance(future.exception(), ZeroDivisionError) for future in futures)
    with pytest.raises(ZeroDivisionError):
        batcher(0)
    assert batcher(4) == 0.25
    batcher.close()
