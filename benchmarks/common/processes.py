"""Commands that run side by side, each in a process of its own, until they end or have to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.common.deadline import Deadline

GRACE = 15.0
_PERIOD = 0.1


@dataclass(frozen=True)
class Job:
    """A Python module with arguments.

    Attributes:
        module: run with ``python -m``.
        environment: changes to this process's own; None removes a variable.
        folder: to run in; None: this process's own.
        shown: its output goes where this process's does, instead of into the result.
    """

    module: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    folder: Path | None = None
    shown: bool = False


@dataclass(frozen=True)
class Ended:
    """``code`` is the exit status (negative: a signal), None if the job was ended here."""

    code: int | None
    output: str
    seconds: float


def run(
    jobs: Mapping[str, Job],
    deadline: Deadline,
    check: Callable[[], None] = lambda: None,
    grace: float = GRACE,
) -> dict[str, Ended]:
    """Run them all at once. What still runs at the deadline, or when ``check`` raises, is asked to
    end, and made to after ``grace`` seconds."""
    running = {name: _Running(job) for name, job in jobs.items()}
    try:
        while _that_run(running.values()) and not deadline.passed:
            check()
            time.sleep(_PERIOD)
    finally:
        _end(_that_run(running.values()), grace)
    return {name: each.ended() for name, each in running.items()}


def _end(running: Sequence[_Running], grace: float) -> None:
    for each in running:
        each.was_ended = True
        each.send(signal.SIGTERM)
    until = Deadline.after(grace)
    while _that_run(running) and not until.passed:
        time.sleep(_PERIOD)
    for each in running:
        each.send(signal.SIGKILL)
        each.process.wait()


def _that_run(jobs: Iterable[_Running]) -> list[_Running]:
    return [each for each in jobs if each.runs]


class _Running:
    def __init__(self, job: Job) -> None:
        environment = {**os.environ, **job.environment}
        self._output: IO[bytes] | None = None if job.shown else tempfile.TemporaryFile()  # noqa: SIM115
        self._start, self._seconds = time.monotonic(), 0.0
        self.was_ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", job.module, *job.arguments],
            env={name: value for name, value in environment.items() if value is not None},
            cwd=job.folder,
            stdout=self._output,
            stderr=None if job.shown else subprocess.STDOUT,
            # What it starts itself ends with it, and Ctrl-C comes through us.
            start_new_session=True,
        )

    @property
    def runs(self) -> bool:
        runs = self.process.poll() is None
        if not runs and not self._seconds:
            self._seconds = time.monotonic() - self._start
        return runs

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> Ended:
        output = ""
        if self._output is not None:
            self._output.seek(0)
            output = self._output.read().decode(errors="replace")
            self._output.close()
        seconds = self._seconds or time.monotonic() - self._start
        return Ended(None if self.was_ended else self.process.returncode, output, seconds)
