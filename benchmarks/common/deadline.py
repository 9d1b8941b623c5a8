"""Time that may be spent, and what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Now = Callable[[], float]


@dataclass(frozen=True)
class Deadline:
    """A moment after which nothing new is begun. ``now`` gives seconds from any start."""

    at: float
    now: Now = time.monotonic

    @classmethod
    def after(cls, seconds: float, now: Now = time.monotonic) -> Deadline:
        return cls(now() + seconds, now)

    @property
    def left(self) -> float:
        """Seconds; 0 once it has passed."""
        return max(0.0, self.at - self.now())

    @property
    def passed(self) -> bool:
        return self.left == 0

    def part(self, name: str, shares: Mapping[str, float]) -> Deadline:
        """For the part ``name`` of what is still to be done: its share of the time that is left."""
        return Deadline(self.now() + self.left * shares[name] / sum(shares.values()), self.now)
