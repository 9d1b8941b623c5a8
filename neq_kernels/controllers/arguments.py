"""Checks of the arguments that several controllers take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def check_fraction(name: str, value: float, maximum: float = 1.0) -> float:
    """``value`` as a float in [0, maximum].

    Raises:
        TypeError, ValueError: it is no such number; ``name`` is in the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or not 0 <= number <= maximum:
        upper = "" if math.isinf(maximum) else f" and at most {maximum:g}"
        raise ValueError(f"{name}: expected a finite number, at least 0{upper}, got {number!r}")
    return number


def check_count(name: str, value: int) -> int:
    """``value`` as an int >= 0; errors as in :func:`check_fraction`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return int(value)


def check_choice(name: str, value: object, choices: Mapping[Any, Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in list(choices):
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
