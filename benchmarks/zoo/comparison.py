"""A converted model beside its dense self: one forward, half of it frozen, gradients compared."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from neq_kernels.channels import ActiveChannels
from neq_kernels.layers.traversal import neuron_owners


@dataclass(frozen=True)
class Tolerance:
    """What may differ between two sums of the same terms; a wrong row differs by all of itself.

    Attributes:
        gradient: of the largest value of a parameter's gradient.
        least_scale: gradients that are 0 but for rounding are held to this share of the model's
            largest one.
        step: of the largest of a weight's value and the learning rate.
    """

    gradient: float
    least_scale: float
    step: float


FLOAT64 = Tolerance(gradient=1e-9, least_scale=1e-4, step=1e-12)
FLOAT32 = Tolerance(gradient=5e-4, least_scale=1e-2, step=1e-6)


@dataclass
class Example:
    """A model, in training mode, and what it is called with: ``model(*args, **kwargs)``."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def in_dtype(self, dtype: torch.dtype) -> Example:
        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            if isinstance(value, Mapping):
                return {key: cast(each) for key, each in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(cast(each) for each in value)
            return value

        return Example(self.model.to(dtype), cast(self.args), cast(self.kwargs))

    def forward(self, model: nn.Module) -> list[Tensor]:
        """Every tensor it returns: each time from the same buffers and with the same seed."""
        for name, buffer in model.named_buffers():
            before = self.buffers.setdefault(name, buffer.clone())
            if before.shape == buffer.shape and not torch.equal(before, buffer):
                buffer.data.copy_(before)
        seed()
        outputs = _every_leaf(model(*self.args, **self.kwargs))
        return [output for output in outputs if isinstance(output, Tensor)]


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def freeze_half(model: nn.Module) -> dict[Parameter, Tensor]:
    """Freeze a random half of every layer's neurons, the same in layers that share a parameter.

    Returns:
        Of every parameter that neurons own, its frozen neurons.
    """
    owners = neuron_owners(model)
    generator = torch.Generator().manual_seed(1)
    chosen: dict[ActiveChannels, Tensor] = {}
    for known in owners.values():
        active = next((chosen[c] for c, _ in known if c in chosen), None)
        if active is None:
            k = len(known[0][0])
            active = torch.randperm(k, generator=generator)[: (k + 1) // 2]
        for channels, _ in known:
            chosen.setdefault(channels, active)
    for channels, active in chosen.items():
        channels.set(active)
    return {
        p: (~torch.stack([c.mask for c, _ in known]).any(0)).nonzero().flatten()
        for p, known in owners.items()
    }


def gradient_faults(
    dense: nn.Module, model: nn.Module, frozen: Mapping[Parameter, Tensor], tolerance: Tolerance
) -> dict[str, list[str]]:
    """Parameters whose gradient is wrong: under ``"frozen"`` those with a frozen neuron's that is
    not exactly 0, under ``"gradients"`` those that differ from the dense one anywhere else.

    Args:
        dense: has the dense gradients.
        model: has the gradients to judge, and the names of ``dense``.
        frozen: as :func:`freeze_half` returns it.
    """
    theirs = dict(dense.named_parameters())
    largest = max(
        (float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None and p.numel()),
        default=0.0,
    )
    owners = neuron_owners(model)
    faults: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        want, got = theirs[name].grad, parameter.grad
        if not parameter.numel() or (want is None and got is None):
            continue
        want = torch.zeros_like(parameter) if want is None else want
        got = torch.zeros_like(parameter) if got is None else got
        keep = torch.ones_like(parameter, dtype=torch.bool)
        rows = frozen.get(parameter)
        if rows is not None and len(rows):
            layout = owners[parameter][0][1]
            layout.fill_(keep, rows, False)
            if bool(layout.gather(got, rows).ne(0).any()):
                faults.setdefault("frozen", []).append(name)
        scale = max(float(want.abs().max()), tolerance.least_scale * largest)
        error = float(torch.where(keep, got - want, 0).abs().max()) / scale if scale else 0.0
        if not error <= tolerance.gradient:
            faults.setdefault("gradients", []).append(f"{name} (off by {error:.1e})")
    return faults


def weighted_sum(outputs: Sequence[Tensor]) -> Tensor:
    """A random weighting: a plain sum has no gradient below a softmax or a norm."""
    generator = torch.Generator().manual_seed(2)
    terms = [
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum()
        for t in outputs
        if t.requires_grad and t.is_floating_point()
    ]
    if not terms:
        raise ValueError("no output needs a gradient")
    return torch.stack([term.double() for term in terms]).sum()


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bool((x.eq(y) | (x.ne(x) & y.ne(y))).all())
        for x, y in zip(a, b, strict=True)
    )


def _every_leaf(outputs: Any) -> list[Any]:
    """Also of what PyTorch's pytrees do not know: mappings, and objects with attributes."""
    leaves = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Mapping):
            leaves += _every_leaf(list(leaf.values()))
        else:
            leaves.append(leaf)
    return leaves
