"""Are these still the same objects? Asked at every step, of all that a model and an optimizer hold,
so without a line of Python per object."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable

_END = object()


def remember(objects: Iterable[object]) -> list[object]:
    """What :func:`same_objects` compares with later."""
    return [*objects, _END]


def same_objects(remembered: list[object], objects: Iterable[object]) -> bool:
    """Whether these are the remembered ones, by identity, no more and no fewer."""
    return all(map(operator.is_, remembered, itertools.chain(objects, (_END,))))
