"""Stopping at a safe moment: a signal sets a flag, the training loop looks at it between steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

from benchmarks.common import cli


class Interrupted(Exception):
    """Raised by :meth:`Interruptible.check` after a signal. ``exit_code`` is 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruptible:
    """Within it, the first SIGINT or SIGTERM is remembered and the second one acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: int | None = None

    def __enter__(self) -> Interruptible:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for each, handler in self._before.items():
            signal.signal(each, handler)


def exit_code(work: Callable[[Interruptible], None], advice: str = "") -> int:
    """Of a command that does ``work``: 0, 2 after naming an error, 128 + signal after an interrupt,
    of which ``advice`` says how to go on."""
    try:
        with Interruptible() as interruptible:
            work(interruptible)
    except Interrupted as interrupted:
        print(f"stopped ({interrupted}){advice}")
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError) as error:
        return cli.user_error(error)
    return 0
