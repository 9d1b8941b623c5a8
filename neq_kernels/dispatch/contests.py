"""Contests: where the cost model is in doubt, kernels are timed in turns in the backwards of a real
training.

Every backward returns the gradient of the kernel that the model predicts, so that a contest changes
no bits; its winner serves from the next change of masks on.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from neq_kernels.backends.base import BackwardCall, Grads
from neq_kernels.backends.problem import KernelChoice, Strategy

logger = logging.getLogger(__name__)

# What all contests of a process may cost together: so many seconds at once, and this share of the
# time since the first of them.
ALLOWED_SECONDS, ALLOWED_SHARE = 0.5, 0.005
# Each candidate's turns. The first of them is not counted: it finds nothing prepared.
TURNS = 6
# How much faster than PyTorch's kernel another one has to be.
_MARGIN = 0.97

Clock = Callable[[], float]


class Allowance:
    """What may still be spent on contests."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._since: float | None = None
        self.spent = 0.0

    def is_left(self) -> bool:
        now = self._clock()
        if self._since is None:
            self._since = now
        return self.spent < ALLOWED_SECONDS + ALLOWED_SHARE * (now - self._since)


class Contests:
    """Those that are open.

    Attributes:
        allowance: what all of them together may cost.
    """

    def __init__(self) -> None:
        self.allowance = Allowance()
        self._open: dict[Hashable, Contest] = {}

    def __len__(self) -> int:
        return len(self._open)

    def get(self, name: Hashable) -> Contest | None:
        """The open contest of this name."""
        return self._open.get(name)

    def open(
        self,
        name: Hashable,
        choices: Sequence[KernelChoice],
        settle: Callable[[KernelChoice], None],
    ) -> Contest:
        """A new one; ``settle`` is given its winner."""

        def close(winner: KernelChoice) -> None:
            self._open.pop(name, None)
            settle(winner)

        contest = self._open[name] = Contest(choices, self.allowance, close)
        return contest


class Contest:
    """The candidates for one weight gradient.

    Args:
        choices: the predicted kernel first.
        allowance: shared with other contests.
        settle: is given the winner.
        clock: seconds from an arbitrary start.

    Attributes:
        is_over: nothing more is measured.
        predicted: the kernel whose gradients are returned.
    """

    def __init__(
        self,
        choices: Sequence[KernelChoice],
        allowance: Allowance,
        settle: Callable[[KernelChoice], None],
        clock: Clock = time.perf_counter,
    ) -> None:
        self.predicted = choices[0]
        self.is_over = False
        self._samples: dict[KernelChoice, list[float]] = {choice: [] for choice in choices}
        self._allowance, self._settle, self._clock = allowance, settle, clock

    def run(
        self,
        call_of: Callable[[KernelChoice], BackwardCall],
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
    ) -> Grads:
        """The gradients by the predicted kernel. If there is time for it, one candidate's weight
        gradient is timed before, so that none finds in the caches what another has read."""
        predicted = call_of(self.predicted)
        wants_input, wants_weight, wants_bias = output_mask
        if self.is_over or not wants_weight or not self._allowance.is_left():
            return predicted(grad_output, input, weight, output_mask)
        wgrad = (False, True, wants_bias)
        turn = min(self._samples, key=lambda choice: len(self._samples[choice]))
        if turn == self.predicted:
            start = self._clock()
            _, dw, db = predicted(grad_output, input, weight, wgrad)
            self._keep(turn, self._clock() - start)
            dx = None
            if wants_input:
                dx = predicted(grad_output, input, weight, (True, False, False))[0]
            return dx, dw, db
        start = self._clock()
        try:
            call_of(turn)(grad_output, input, weight, wgrad)
        except Exception as error:  # whatever a kernel that nobody asked for has to say
            logger.warning("%s is passed over: %s", turn, error)
            del self._samples[turn]
        else:
            self._keep(turn, self._clock() - start)
        self._allowance.spent += self._clock() - start
        return predicted(grad_output, input, weight, output_mask)

    def _keep(self, choice: KernelChoice, seconds: float) -> None:
        self._samples[choice].append(seconds)
        if all(len(times) >= TURNS for times in self._samples.values()):
            self.is_over = True
            self._settle(self._winner())

    def _winner(self) -> KernelChoice:
        medians = {
            choice: statistics.median(times[1:])
            * (_MARGIN if choice.strategy == Strategy.DENSE else 1.0)
            for choice, times in self._samples.items()
        }
        return min(medians, key=lambda choice: medians[choice])
