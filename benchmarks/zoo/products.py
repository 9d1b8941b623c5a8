"""Which products a step computes with a parameter: counted below autograd, by this file alone.

The library's own report is not asked: what is counted is what PyTorch and the library's operators
are told to compute. A product is a matrix product or a convolution one of whose operands comes from
parameters by views, casts, copies or arithmetic among parameters and constants, and not from the
model's input. So products inside attention do not count, an expert's slice of a 3-D parameter, a
standardised weight and a recurrent layer's gates do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operands = tuple[Tensor, Tensor, int]
Names = frozenset[str]

# What depends on the model's input; a set of names is what depends on those parameters alone.
_DATA = None


@dataclass(frozen=True)
class Product:
    """``macs`` multiply-accumulates with what comes from the parameters ``names``."""

    names: Names
    macs: int


class Products(TorchDispatchMode):
    """Within it, ``forward`` collects the products of a forward and, once ``in_backward`` is set,
    ``input_gradients`` those that carry a gradient to a layer's input.

    Attributes:
        first_use: parameter name to the number of the first operator that reads it.
        computes_in_float32: whether something of that type depends on the input.

    Args:
        model: whose parameters count.
        inputs: what it is called with.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.in_backward = False
        self.forward: list[Product] = []
        self.input_gradients: list[Product] = []
        self.first_use: dict[str, int] = {}
        self.computes_in_float32 = False
        self._operators = 0
        # Storages are known by address: what holds one must live as long as the count.
        self._alive: list[Tensor] = []
        self._labels: dict[int, Names | None] = {}
        for name, parameter in model.named_parameters():
            known = self._labels.get(_storage(parameter)) or frozenset()
            self._labels[_storage(parameter)] = known | {name}
        for tensor in _tensors(inputs):
            self._labels[_storage(tensor)] = _DATA

    @property
    def macs(self) -> int:
        """Of the forward."""
        return sum(product.macs for product in self.forward)

    @property
    def input_gradient_macs(self) -> int:
        return sum(product.macs for product in self.input_gradients)

    def share_of(self, owned: Mapping[str, float]) -> float:
        """The share of the forward's products that belongs to neurons.

        Args:
            owned: elements of each parameter that neurons own over all its elements; a name that is
                missing counts as 0. A product with several parameters takes their mean.
        """
        if not self.macs:
            return 0.0
        inside = sum(
            product.macs * sum(owned.get(name, 0.0) for name in product.names) / len(product.names)
            for product in self.forward
        )
        return inside / self.macs

    def largest_outside(self, owned: Mapping[str, float]) -> tuple[str, float] | None:
        """The parameter without neurons whose products are most, with their share, all of those of
        its name in other blocks included; None: there is none."""
        outside: dict[str, float] = {}
        for product in self.forward:
            for name in product.names:
                if not owned.get(name, 0.0):
                    alike = ".".join("*" if part.isdigit() else part for part in name.split("."))
                    outside[alike] = outside.get(alike, 0.0) + product.macs / len(product.names)
        if not outside:
            return None
        largest = max(outside, key=lambda name: outside[name])
        return largest, outside[largest] / self.macs

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        self._operators += 1
        if not self.in_backward:
            for tensor in read:
                for name in self._names(tensor):
                    self.first_use.setdefault(name, self._operators)
        is_product = self._count(func, args, result)
        self._label(read, _tensors(result), is_product)
        return result

    def _names(self, tensor: Tensor) -> Names:
        """Empty for constants and what depends on the input."""
        return self._labels.get(_storage(tensor)) or frozenset()

    def _count(self, func: Any, args: tuple[Any, ...], result: Any) -> bool:
        name = str(func.name()).partition(".")[0]
        if name in _GRADIENTS:
            weight, macs = _GRADIENTS[name](*args)
            if macs and (names := self._names(weight)):
                self.input_gradients.append(Product(names, macs))
            return True
        if name not in _PRODUCTS:
            return False
        left, right, macs = _PRODUCTS[name](args, result)
        # Of two that come from parameters the second is the weight: F.linear's order.
        names = self._names(right) or self._names(left)
        if names and macs:
            (self.input_gradients if self.in_backward else self.forward).append(
                Product(names, macs)
            )
        return True

    def _label(self, read: list[Tensor], made: list[Tensor], is_product: bool) -> None:
        data = is_product
        names: Names = frozenset()
        for tensor in read:
            label = self._labels.get(_storage(tensor), frozenset())
            if label is _DATA:
                data = True
            else:
                names |= label
        for tensor in made:
            if data:
                self._labels[_storage(tensor)] = _DATA
                if tensor.dtype == torch.float32 and not self.in_backward:
                    self.computes_in_float32 = True
            elif names:
                self._labels[_storage(tensor)] = names
        if data or names:
            self._alive += made


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _first_two(args: tuple[Any, ...], result: Any) -> Operands:
    left, right = args[:2]
    return left, right, left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _last_two_of_three(args: tuple[Any, ...], result: Any) -> Operands:
    return _first_two(args[1:3], result)


def _grouped(args: tuple[Any, ...], result: Any) -> Operands:
    left, right = args[:2]
    # [T, K] x [E, K, N]: every token meets one expert.
    macs = left.numel() * right.shape[-1]
    return left, right, macs // left.shape[0] if left.dim() == 3 and right.dim() == 2 else macs


def _convolution(args: tuple[Any, ...], result: Any) -> Operands:
    input, weight, transposed = args[0], args[1], args[6]
    outputs = input.numel() if transposed else result.numel()
    return input, weight, outputs * weight[0].numel()


def _deformed(args: tuple[Any, ...], result: Any) -> Operands:
    return args[0], args[1], result.numel() * args[1][0].numel()


def _trilinear(args: tuple[Any, ...], result: Any) -> Operands:
    left, right = args[:2]
    return left, right, math.prod(left.shape[:1]) * right.numel()


_PRODUCTS: dict[str, Callable[[tuple[Any, ...], Any], Operands]] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv", "aten::dot"), _first_two),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addmv"), _last_two_of_three),
    "aten::addbmm": _last_two_of_three,
    "aten::_grouped_mm": _grouped,
    "aten::convolution": _convolution,
    "torchvision::deform_conv2d": _deformed,
    "aten::_trilinear": _trilinear,
}


def _convolution_backward(*args: Any) -> tuple[Tensor, int]:
    grad_output, input, weight = args[:3]
    transposed, output_mask = args[7], args[10]
    outputs = input.numel() if transposed else grad_output.numel()
    return weight, outputs * weight[0].numel() if output_mask[0] else 0


def _our_linear_backward(*args: Any) -> tuple[Tensor, int]:
    grad_output, weight, output_mask = args[0], args[3], args[7]
    return weight, grad_output.numel() * weight.shape[1] if output_mask[0] else 0


def _our_conv_backward(*args: Any) -> tuple[Tensor, int]:
    grad_output, input_size, weight = args[0], args[2], args[3]
    transposed, output_mask = args[7], args[13]
    outputs = math.prod(input_size) if transposed else grad_output.numel()
    return weight, outputs * weight[0].numel() if output_mask[0] else 0


# Several gradients by one operator: the weight, and the products of the input's alone.
_GRADIENTS: dict[str, Callable[..., tuple[Tensor, int]]] = {
    "aten::convolution_backward": _convolution_backward,
    "neq_kernels::linear_backward": _our_linear_backward,
    "neq_kernels::conv_backward": _our_conv_backward,
}
