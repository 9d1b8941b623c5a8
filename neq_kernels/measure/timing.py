"""Seconds of a training step, phase by phase.

Several variants are timed interleaved in one process, because only their ratio means anything: the
machine's speed drifts by more than most savings.

>>> dense = Variant("dense", model, loss, optimizer)
>>> ours = Variant("neq", converted_model, loss, attached_optimizer)
>>> times = step_time([dense, ours], batches)
>>> times.speedup("neq", over="dense")
Quantiles(p20=1.12, median=1.13, p80=1.15)
"""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq_kernels.machine import Machine, machine

PHASES = ("forward", "backward", "optimizer")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Quantiles:
    """20 %, 50 % and 80 % of some samples."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        """Linearly interpolated. Raises ValueError without samples."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        values = torch.tensor(samples, dtype=torch.float64).quantile(levels)
        return cls(*values.tolist())


class PhaseClock:
    """Seconds by named phase. With a GPU it waits for the device at both ends of a phase, so that
    each phase is charged with its own work.

    >>> clock = PhaseClock(device)
    >>> with clock.phase("forward"):
    ...     output = model(x)
    >>> clock.samples["forward"]  # one entry per use, in seconds
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.samples: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block; a block left by an exception is not recorded."""
        start = self.now()
        yield
        self.samples.setdefault(name, []).append(self.now() - start)

    def now(self) -> float:
        """Seconds from an arbitrary start, once the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def totals(self) -> dict[str, float]:
        """Seconds by phase, all samples together."""
        return {name: sum(samples) for name, samples in self.samples.items()}


@dataclass(frozen=True)
class Variant:
    """One way to train that is to be timed.

    Attributes:
        name: unique among the variants.
        model: any module, plain or converted, with the masks it is to be timed with.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar.
        optimizer: its step is the third phase; None leaves that phase empty.
    """

    name: str
    model: nn.Module
    loss: Loss
    optimizer: Optimizer | None = None

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class StepTime:
    """Seconds of each timed step of one variant, by phase; entry ``i`` of every list is round
    ``i``."""

    name: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    optimizer: tuple[float, ...]

    @property
    def total(self) -> tuple[float, ...]:
        """Seconds of whole steps: the three phases together."""
        return tuple(
            map(sum, zip(self.forward, self.backward, self.optimizer, strict=True)),
        )

    def quantiles(self, phase: str = "total") -> Quantiles:
        """Of ``total``, ``forward``, ``backward`` or ``optimizer``.

        Raises:
            ValueError: another phase.
        """
        if phase not in ("total", *PHASES):
            raise ValueError(f"phase: expected total or one of {PHASES}, got {phase!r}")
        samples: tuple[float, ...] = getattr(self, phase)
        return Quantiles.of(samples)


@dataclass(frozen=True)
class StepTimes:
    """What :func:`step_time` measured."""

    variants: tuple[StepTime, ...]
    machine: Machine = field(default_factory=machine)

    def __getitem__(self, name: str) -> StepTime:
        """The variant of that name. Raises KeyError if there is none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(f"variant: expected one of {[v.name for v in self.variants]}, got {name!r}")

    def speedup(self, name: str, *, over: str, phase: str = "total") -> Quantiles:
        """How many times faster ``name`` is than ``over``: quantiles of the ratios within the same
        round, so that drift of the machine cancels."""
        return Quantiles.of(self.ratios(name, over=over, phase=phase))

    def ratios(self, name: str, *, over: str, phase: str = "total") -> list[float]:
        """How many times faster ``name`` is than ``over``, round by round."""
        self[name].quantiles(phase)
        slow, fast = getattr(self[over], phase), getattr(self[name], phase)
        return [s / f for s, f in zip(slow, fast, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Samples, quantiles (seconds) and machine, ready for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "variants": [
                asdict(v) | {"quantiles": {p: asdict(v.quantiles(p)) for p in ("total", *PHASES)}}
                for v in self.variants
            ],
        }


def step_time(
    variants: Variant | Sequence[Variant],
    batches: Sequence[Any],
    *,
    warmup: int = 3,
    repeats: int = 20,
) -> StepTimes:
    """Time training steps of one or several variants, interleaved, phase by phase.

    Every round runs one step of each variant on the same batch, in an order of its own, because a
    step finds what the one before left in the caches and in the allocator; the batches rotate, so
    give several: one alone stays in the cache. Modules run in the mode they
    are in. Afterwards parameters, buffers, optimizer state, gradients and random state are what
    they were before.

    Args:
        variants: what to time.
        batches: inputs, already on the device, passed to each variant's ``loss``.
        warmup: rounds that are run and thrown away.
        repeats: rounds that are recorded.

    Raises:
        ValueError: no variants, two of one name, no batches, ``warmup`` < 0 or ``repeats`` < 1.
    """
    variants = [variants] if isinstance(variants, Variant) else list(variants)
    _validate(variants, batches, warmup, repeats)
    clocks = {variant.name: PhaseClock(variant.device) for variant in variants}
    shuffled = random.Random(0)
    with ExitStack() as stack:
        for variant in variants:
            stack.enter_context(_put_back(variant))
        stack.enter_context(_no_garbage_collection())
        for i in range(warmup + repeats):
            if i == warmup:
                clocks = {name: PhaseClock(clock.device) for name, clock in clocks.items()}
            for variant in shuffled.sample(variants, len(variants)):
                run_step(variant, batches[i % len(batches)], clocks[variant.name])
    return StepTimes(
        tuple(
            StepTime(name, *(tuple(clock.samples[phase]) for phase in PHASES))
            for name, clock in clocks.items()
        )
    )


def run_step(variant: Variant, batch: Any, clock: PhaseClock) -> None:
    """One training step under the clock. Clearing gradients belongs to the optimizer's phase."""
    with clock.phase("forward"):
        loss = variant.loss(variant.model, batch)
    with clock.phase("backward"):
        loss.backward()
    with clock.phase("optimizer"):
        if variant.optimizer is not None:
            variant.optimizer.step()
        variant.model.zero_grad(set_to_none=True)


def _validate(
    variants: Sequence[Variant], batches: Sequence[Any], warmup: int, repeats: int
) -> None:
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"variants: expected one or more with distinct names, got {names}")
    if len(batches) == 0:
        raise ValueError("batches: expected at least one, got none")
    if warmup < 0:
        raise ValueError(f"warmup: expected at least 0, got {warmup}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")


@contextmanager
def _put_back(variant: Variant) -> Iterator[None]:
    model, optimizer = variant.model, variant.optimizer
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    model.zero_grad(set_to_none=True)
    cuda = [variant.device] if variant.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name]
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
