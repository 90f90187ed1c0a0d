"""An iterator that is read ahead of its consumer, on a thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefetched(source: Iterator[Item], depth: int) -> Iterator[Item]:
    """The items of `source`, at most `depth` of them read ahead by a thread that starts with the first one.

    What `source` raises is raised here in its turn, after the items before it. The thread ends with the source, and
    where this iterator is closed or dropped, as soon as the item that is being read is there.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    dropped = threading.Event()

    def read() -> None:
        try:
            for item in source:
                items.put(("item", item))
                if dropped.is_set():
                    return
            items.put(("end", None))
        except BaseException as error:
            items.put(("error", error))

    def drop() -> None:
        dropped.set()
        # A thread that waits for room finds it, and then that it is no longer needed.
        while not items.empty():
            items.get_nowait()

    for ended in [other for other in _started if not other.is_alive()]:
        del _started[ended]
    thread = threading.Thread(target=read, name="aksae-prefetch", daemon=True)
    thread.start()
    _started[thread] = drop
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        drop()


_started: dict[threading.Thread, Callable[[], None]] = {}
"""Threads that may not have ended: none takes itself off the list, since it has its source to close after that."""


@atexit.register
def _end() -> None:
    """End all threads before the interpreter does: one that computes while its libraries are unloaded may crash."""
    for thread, drop in list(_started.items()):
        drop()
        thread.join()
