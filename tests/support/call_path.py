"""The Python functions of the package that stand between a user's call and a kernel."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.autograd import eager, forward

PACKAGE = str(Path(neq.__file__).parent)


class Recording:
    """Operators that note, when one is called, the package's functions on the stack."""

    def __init__(self, operators: object, paths: dict[str, list[str]], name: str = "") -> None:
        self._operators, self._paths, self._name = operators, paths, name

    def __getattr__(self, name: str) -> Recording:
        return Recording(getattr(self._operators, name), self._paths, f"{self._name}.{name}")

    def __call__(self, *arguments: object) -> object:
        self._paths.setdefault(self._name, functions_on_the_stack())
        return self._operators(*arguments)


def functions_on_the_stack() -> list[str]:
    """Of the package, the outermost first."""
    stack = traceback.extract_stack()
    return [frame.name for frame in stack if frame.filename.startswith(PACKAGE)]


def path_of_a_linear_layer(
    module: object, monkeypatch: pytest.MonkeyPatch, device: str, autocast: bool = False
) -> list[str]:
    """On the way to PyTorch's forward, then from ``backward()`` to the gradient's operator.

    Args:
        module: of a backend, whose operators are its ``_leaf``.
    """
    paths: dict[str, list[str]] = {}
    function = torch.nn.functional.linear

    def linear(*arguments: torch.Tensor) -> torch.Tensor:
        paths.setdefault("forward", functions_on_the_stack())
        return function(*arguments)

    for where in (forward, eager):
        monkeypatch.setattr(where.F, "linear", linear)
    monkeypatch.setattr(module, "_leaf", Recording(module._leaf, paths))
    model = neq.convert(nn.Sequential(nn.Linear(64, 64))).to(device)
    model[0].channels.set(range(0, 16, 2))
    x = torch.randn(32, 64, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        output = model(x)
    output.sum().backward()
    (backward,) = (path for name, path in paths.items() if "linear" in name)
    return [*paths["forward"], *backward]
