"""Velocities of neurons: both published recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

VelocityName = Literal["slide", "reference"]


def slide_velocity(mu: float, velocity: Tensor, delta: Tensor, last_delta: Tensor) -> Tensor:
    """``v(t) = Δφ(t) − μ·v(t−1)``: the NEq paper."""
    return delta - mu * velocity


def reference_velocity(mu: float, velocity: Tensor, delta: Tensor, last_delta: Tensor) -> Tensor:
    """``v(t) = μ·v(t−1) + Δφ(t) − Δφ(t−1)``: the public code of NEq."""
    return mu * velocity + delta - last_delta


VELOCITIES: dict[VelocityName, Callable[[float, Tensor, Tensor, Tensor], Tensor]] = {
    "slide": slide_velocity,
    "reference": reference_velocity,
}
