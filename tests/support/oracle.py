"""What the tests compare with: dense autograd in float64, frozen neurons overwritten by zeros.

Written without the package's own ideas of layouts and masks, on purpose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neq_kernels import ops
from neq_kernels.backends.problem import Strategy
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch.selection import selector

CONV = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


# --- backends ------------------------------------------------------------------------------------


def usable_backends() -> list[str]:
    """The backends that serve CPU tensors on this machine; one with a choice of strategies once for
    each of them too, as ``backend-strategy``."""
    names = [name for name, reason in selector.availability() if reason is None]
    usable = [name for name in ("reference", "aten", "cpu") if name in names]
    strategies = (Strategy.DENSE, Strategy.PACK, Strategy.CUSTOM)
    return usable + [f"cpu-{s.name}" for s in strategies if "cpu" in usable]


@contextlib.contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Everything inside is served by the backend of this name, see :func:`usable_backends`."""
    name, _, strategy = name.partition("-")
    forced = selector.forced_strategy(Strategy[strategy]) if strategy else contextlib.nullcontext()
    with selector.forced_backend(name), forced:
        yield


# --- masks ---------------------------------------------------------------------------------------


def channels_with(mask: Sequence[bool] | Tensor) -> ActiveChannels:
    """Channels of which exactly those with True are active."""
    channels = ActiveChannels(len(mask))
    channels.set(torch.as_tensor(mask, dtype=torch.bool))
    return channels


def ragged(k: int) -> list[bool]:
    """Active and frozen neurons mixed, both kinds present for k >= 2, no contiguous run."""
    return [i % 3 != 1 for i in range(k)]


def half(k: int) -> list[bool]:
    """Every other neuron, the first one active."""
    return [i % 2 == 0 for i in range(k)]


# --- neurons in a gradient -----------------------------------------------------------------------


def neuron(weight: Tensor, k: int, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """A view of neuron ``k`` of a weight or bias, read off the definition of the layer."""
    if not transposed or weight.dim() == 1:
        return weight[k]
    per_group = weight.shape[1]
    inputs = weight.shape[0] // groups
    group = k // per_group
    return weight[group * inputs : (group + 1) * inputs, k % per_group]


def zero_frozen(
    gradient: Tensor, mask: Sequence[bool], *, transposed: bool = False, groups: int = 1
) -> Tensor:
    """A copy of ``gradient`` with the neurons overwritten that the mask does not name."""
    result = gradient.clone()
    for k, active in enumerate(mask):
        if not active:
            neuron(result, k, transposed=transposed, groups=groups).zero_()
    return result


def assert_frozen_are_zero(
    gradient: Tensor, mask: Sequence[bool], *, transposed: bool = False, groups: int = 1
) -> None:
    """Frozen neurons are +0, every element of them."""
    for k, active in enumerate(mask):
        if not active:
            row = neuron(gradient, k, transposed=transposed, groups=groups)
            assert bool((row == 0).all()), f"frozen neuron {k} has a gradient: {row}"
            assert not bool(row.signbit().any()), f"frozen neuron {k} holds -0"


# --- the dense gradients -------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """The arguments of a convolution; ``kernel`` and the rest have one entry per dimension."""

    kernel: tuple[int, ...]
    in_per_group: int = 1
    out_per_group: int = 1
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    transposed: bool = False

    def __post_init__(self) -> None:
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * len(self.kernel))
        if not self.output_padding:
            object.__setattr__(self, "output_padding", (0,) * len(self.kernel))

    @property
    def k(self) -> int:
        return self.groups * self.out_per_group

    @property
    def c(self) -> int:
        return self.groups * self.in_per_group

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.transposed:
            return (self.c, self.out_per_group, *self.kernel)
        return (self.k, self.in_per_group, *self.kernel)

    @property
    def layout(self) -> dict[str, object]:
        return {"transposed": self.transposed, "groups": self.groups}

    def keywords(self) -> dict[str, object]:
        """The keyword arguments of ``neq_kernels.functional.conv``."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "transposed": self.transposed,
            "output_padding": self.output_padding,
        }

    def geometry(self) -> tuple[object, ...]:
        """The arguments of the op between the weight and ``order``."""
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """PyTorch's own convolution."""
        n = len(self.kernel) - 1
        if self.transposed:
            return CONV_TRANSPOSE[n](
                x,
                weight,
                bias,
                self.stride,
                self.padding,
                self.output_padding,
                self.groups,
                self.dilation,
            )
        return CONV[n](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def but(self, **changes: object) -> Conv:
        return replace(self, **changes)


def dense(function, *leaves: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``function(*leaves)`` by autograd."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, grad_output.to(out.dtype))


def conv_gradients(
    case: Conv, x: Tensor, weight: Tensor, grad_output: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (input, weight, bias) gradients; frozen neurons are zeros."""
    bias = torch.zeros(case.k, dtype=torch.float64)
    dx, dw, db = dense(case.forward, x.double(), weight.double(), bias, grad_output=grad_output)
    return dx, zero_frozen(dw, mask, **case.layout), zero_frozen(db, mask)


def linear_gradients(
    x: Tensor, weight: Tensor, grad_output: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (input, weight, bias) gradients; frozen neurons are zeros."""
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    dx, dw, db = dense(F.linear, x.double(), weight.double(), bias, grad_output=grad_output)
    return dx, zero_frozen(dw, mask), zero_frozen(db, mask)


# --- what is called ------------------------------------------------------------------------------


class CalledOps(TorchDispatchMode):
    """Records the aten ops called inside, those of our own ops' kernels too."""

    KERNELS: ClassVar = {
        torch.ops.neq_kernels.linear_backward.default: ops._linear_backward,
        torch.ops.neq_kernels.conv_backward.default: ops._conv_backward,
    }
    # Views, tensors of one element or none, and what reading host_count calls.
    FREE: ClassVar = {
        "alias",
        "detach",
        "expand",
        "new_empty",
        "reshape",
        "resolve_conj",
        "resolve_neg",
        "lift_fresh",
        "squeeze",
        "t",
        "unsqueeze",
        "view",
        "_unsafe_view",
    }

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.KERNELS:
            with self:
                return self.KERNELS[func](*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def that_compute(self) -> list[str]:
        return [name for name in self.names if name not in self.FREE]


# --- comparing -----------------------------------------------------------------------------------


def small_integers(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in -3..3: sums of their products are exact in float32 and float64, in any order."""
    return torch.randint(-3, 4, tuple(shape)).to(dtype)


def largest(tensor: Tensor) -> float:
    """The maximum norm, 0 for an empty tensor."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def assert_within_dtype_rule(actual: Tensor, low_precision: Tensor, exact: Tensor) -> None:
    """The rule of the specification, in the maximum norm: at most twice the error of PyTorch's own
    result in the same precision, plus one rounding of the output dtype."""
    assert actual.dtype == low_precision.dtype
    error = largest(actual.double() - exact)
    allowed = 2 * largest(low_precision.double() - exact)
    allowed += torch.finfo(actual.dtype).eps / 2 * largest(exact)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_close64(actual: Tensor, exact: Tensor, tolerance: float = 1e-10) -> None:
    """float64 tensors within ``tolerance`` of each other, relative, in the maximum norm."""
    assert actual.dtype == exact.dtype == torch.float64
    assert actual.shape == exact.shape
    error = largest(actual - exact) / max(largest(exact), 1e-300)
    assert error <= tolerance, f"relative error {error:.3e}"
