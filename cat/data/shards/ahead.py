"""Shards that are fetched before their clips are needed."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable

from cat.data.shards.members import Shards


class ReadAhead:
    """Fetches shards in a thread of the process that asks for them, one after the other; what goes wrong is told when a
    clip is read. Processes that ask for the same shard wait for each other (`cat.data.remote.Cache`)."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._begin()

    def _begin(self) -> None:
        self._process, self._asked = os.getpid(), set[int]()
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type, tuple[Shards]]:
        return ReadAhead, (self._shards,)

    def want(self, numbers: Iterable[int]) -> None:
        if self._process != os.getpid():  # forked since: threads are not
            self._begin()
        for number in set(numbers) - self._asked:
            if not self._shards.here(number):
                self._asked.add(number)
                self._waiting.put(number)
        if self._asked and self._thread is None:
            self._thread = threading.Thread(target=self._fetch, daemon=True)
            self._thread.start()

    def _fetch(self) -> None:
        while True:
            number = self._waiting.get()
            with contextlib.suppress(Exception):
                os.close(self._shards[number].open())
            self._asked.discard(number)
