"""Four linear layers, a parameter that no neuron owns, and the ways in which they can be wired."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Wired(nn.Module):
    def __init__(self, wiring: Callable[[Wired, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
        self.p = nn.Parameter(torch.ones(3))
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def residual(m: Wired, x: Tensor) -> Tensor:
    x = m.a(x) + m.p
    x = x + m.b(x)
    return m.c(x)


def skip(m: Wired, x: Tensor) -> Tensor:
    x = m.a(x)
    beside = x * m.p
    return m.c(m.b(x) + beside)


def another_runs_first(m: Wired, x: Tensor) -> Tensor:
    scaled = x * m.p
    return m.b(m.a(x) + scaled)


def cast(m: Wired, x: Tensor) -> Tensor:
    scale = m.p.double().to(x.dtype)
    return m.b(m.a(x * scale) * scale)


def in_place(m: Wired, x: Tensor) -> Tensor:
    x = m.a(x)
    x[:, 1:] += m.p.view(1, 3)[:, 1:]
    return m.b(x)


def reused(m: Wired, x: Tensor) -> Tensor:
    for _ in range(2):
        x = m.a(x * m.p)
    return m.b(x)


def thrown_away(m: Wired, x: Tensor) -> Tensor:
    for _ in range(50):
        x * m.p
    return m.b(m.a(x + 1))


# For each use of the parameter: the layers below the first layer it feeds, and that layer.
WIRINGS: dict[str, tuple[Callable[[Wired, Tensor], Tensor], list[str | None]]] = {
    "stem": (lambda m, x: m.b(m.a(x * m.p)), ["a"]),
    "class token": (lambda m, x: m.b(m.a(torch.cat([m.p.expand(1, -1), x]))), ["a"]),
    "between": (lambda m, x: m.b(m.a(x) * m.p), ["ab"]),
    "residual": (residual, ["ab"]),
    "skip": (skip, ["abc"]),
    "another runs first": (another_runs_first, ["ab"]),
    "towers": (lambda m, x: m.c(m.a(x) + m.b(x * m.p)), ["b"]),
    "twice": (lambda m, x: m.b(m.a(x * m.p) * m.p), ["a", "ab"]),
    "input of a layer": (lambda m, x: m.c(m.b(m.a(m.p)) + x), ["a"]),
    "cast": (cast, ["a", "ab"]),
    "below the head": (lambda m, x: m.d(m.c(m.b(m.a(x))) * m.p), ["abcd"]),
    "in place": (in_place, ["ab"]),
    "reused": (reused, ["a", "a"]),
    "end": (lambda m, x: m.b(m.a(x)) * m.p, [None]),
    "first and last": (lambda m, x: m.b(m.a(x * m.p)) * m.p, ["a", None]),
    "side output": (lambda m, x: m.b(m.a(x)) + (x * m.p).sum(), [None]),
    "thrown away": (thrown_away, [None] * 50),
    "not used": (lambda m, x: m.b(m.a(x)), []),
}
