"""Each model in a child process with a time limit: a crash or a hang is a row like any other.

Children are forked from a process that has imported the libraries and run nothing, so that a model
costs its own seconds only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import torch

from benchmarks.common.deadline import Deadline
from benchmarks.common.records import Row
from benchmarks.zoo import building
from benchmarks.zoo.checks import check
from benchmarks.zoo.entries import Entry

_PERIOD = 0.05


def rows(entries: Sequence[Entry], jobs: int, limit: float) -> Iterator[tuple[Entry, Row]]:
    """Check them, ``jobs`` at a time, and yield each as it ends.

    Args:
        limit: seconds for one model.
    """
    waiting, running = list(entries), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Child(waiting.pop(0), limit))
            for child in [child for child in running if child.has_ended()]:
                running.remove(child)
                yield child.entry, child.row()
            time.sleep(_PERIOD)
    finally:
        for child in running:
            child.end()


class _Child:
    def __init__(self, entry: Entry, limit: float) -> None:
        self.entry, self._limit = entry, limit
        fork = multiprocessing.get_context("fork")
        self._answer, theirs = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_run, args=(entry, theirs))
        self._start, self._deadline = time.monotonic(), Deadline.after(limit)
        self._process.start()
        theirs.close()
        self._row: Row | None = None

    def has_ended(self) -> bool:
        if self._row is None and self._answer.poll():
            with contextlib.suppress(EOFError):
                self._row = self._answer.recv()
        return not self._process.is_alive() or self._deadline.passed

    def row(self) -> Row:
        self.has_ended()  # what it said last
        if self._row is None:
            late = self._process.is_alive()
            self.end()
            reason = f"no end within {self._limit:g} s" if late else self._status()
            self._row = {"built": None, "reason": reason}
        self.end()
        return self._row | {"seconds": round(time.monotonic() - self._start, 1)}

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _status(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        return f"crashed: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"


def _run(entry: Entry, answer: Connection) -> None:
    torch.set_num_threads(1)
    # What libraries print is of no use here.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        answer.send(check(lambda: building.build(entry)))
