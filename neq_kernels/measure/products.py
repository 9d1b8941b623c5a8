"""Which PyTorch functions multiply by a parameter, and the MACs of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_CONVOLUTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PRODUCTS = (F.linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)

# Products of two tensors, by name, and how many tensors stand before the two.
_MATRIX_PRODUCTS = {
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), 0),
    **dict.fromkeys(("outer", "ger", "tensordot", "grouped_mm", "scaled_mm"), 0),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "addr"), 1),
}
# The position of the weight, and its name.
_WITH_A_WEIGHT = {
    "bilinear": (2, "weight"),
    "linear_cross_entropy": (1, "linear_weight"),
    "deform_conv2d": (1, "weight"),
}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_RECURRENT_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
# Between the weights of a recurrent function and its flag: bias, layers, dropout, training.
_BIDIRECTIONAL = 5


@dataclass(frozen=True)
class Product:
    """A product with a parameter: ``input`` times ``weight``, in ``macs`` MACs of which
    ``bias_macs`` add a bias. ``input_needs_grad`` is None where ``input`` itself tells."""

    kind: str
    input: Tensor
    weight: Tensor
    macs: int
    bias_macs: int = 0
    input_needs_grad: bool | None = None


IsWeight = Callable[[Tensor], bool]


def name_of(func: Callable[..., Any]) -> str:
    """``matmul`` for ``Tensor.__matmul__``, ``torch.matmul`` and ``torch.ops.aten.matmul``."""
    return str(getattr(func, "__name__", "")).split(".")[0].strip("_")


def is_matrix_product(func: Callable[..., Any]) -> bool:
    """Whether ``func`` multiplies two tensors of any role: of two weights it makes a weight."""
    return name_of(func) in _MATRIX_PRODUCTS or name_of(func) == "einsum"


def products_of(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    is_weight: IsWeight,
) -> list[Product]:
    """The products with a parameter in one call. Layers' functions (linear, convolutions) count
    whatever their weight is; other products only where ``is_weight`` says so of an operand.

    Args:
        func, args, kwargs, output: the call, as ``__torch_function__`` sees it.
        is_weight: whether a tensor is a parameter, or computed from parameters alone.
    """
    name = name_of(func)
    if func in PRODUCTS or name in _WITH_A_WEIGHT:
        return [_layer_product(func, name, output, *args, **kwargs)]
    if name in _MATRIX_PRODUCTS:
        return list(_matrix_product(name, args, kwargs, output, is_weight))
    if name == "einsum":
        return list(_einsum(args, is_weight))
    if name == "scaled_dot_product_attention":
        return list(_attention(output, is_weight, *args, **kwargs))
    if name in _RECURRENT:
        return list(_recurrent(args, output))
    if name in _RECURRENT_CELLS:
        return list(_recurrent_cell(args, output))
    return []


def _layer_product(
    func: Callable[..., Any], name: str, output: Tensor, input: Tensor, *args: Any, **kwargs: Any
) -> Product:
    position, keyword = _WITH_A_WEIGHT.get(name, (1, "weight"))
    weight = _argument(args, kwargs, position, keyword)
    if func is F.linear:
        return Product("linear", input, weight, input.shape[-1] * output.numel())
    if name == "linear_cross_entropy":
        return Product("linear", input, weight, input.numel() * weight.shape[0])
    if name in _WITH_A_WEIGHT:
        kind = "bilinear" if name == "bilinear" else "conv"
        return Product(kind, input, weight, output.numel() * weight[0].numel())
    bias = _argument(args, kwargs, 2, "bias")
    multiplied = input if func in TRANSPOSED_CONVOLUTIONS else output
    macs, bias_macs = multiplied.numel() * weight[0].numel(), 0 if bias is None else output.numel()
    return Product("conv", input, weight, macs + bias_macs, bias_macs)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """Positions count the input, which is not in ``args``."""
    return args[position - 1] if len(args) >= position else kwargs.get(name)


def _matrix_product(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, is_weight: IsWeight
) -> Iterator[Product]:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    operands = tensors[_MATRIX_PRODUCTS[name] :][:2]
    if len(operands) < 2 or not isinstance(output, Tensor):
        return
    a, b = operands
    if name == "rmatmul":
        a, b = b, a
    if name in ("outer", "ger", "addr"):
        macs = output.numel()
    elif name == "tensordot":  # A c, c B and A B elements
        macs = math.isqrt(a.numel() * b.numel() * output.numel())
    elif name == "addbmm" or (name == "grouped_mm" and a.dim() == b.dim() == 2):
        macs = a.numel() * b.shape[-1]
    else:
        macs = output.numel() * a.shape[-1]
    yield from _with_a_weight("product", a, b, macs, is_weight)


def _with_a_weight(
    kind: str, a: Tensor, b: Tensor, macs: int, is_weight: IsWeight
) -> Iterator[Product]:
    if is_weight(b):
        yield Product(kind, a, b, macs)
    elif is_weight(a):
        yield Product(kind, b, a, macs)


def _attention(
    output: Tensor,
    is_weight: IsWeight,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    **__: Any,
) -> Iterator[Product]:
    yield from _with_a_weight("product", query, key, query.numel() * key.shape[-2], is_weight)
    if is_weight(value):
        yield Product("product", query, value, output.numel() * key.shape[-2])


def _recurrent(args: tuple[Any, ...], output: Any) -> Iterator[Product]:
    """One product for each weight matrix: every one multiplies each step of each sequence."""
    input = args[0]
    position = next(i for i, arg in enumerate(args) if isinstance(arg, list))
    weights = [w for w in args[position] if w.dim() == 2]
    n_layers, both_ways = args[position + 2], args[position + _BIDIRECTIONAL]
    per_direction = len(weights) // (n_layers * (1 + both_ways))
    read_input = (0, per_direction) if both_ways else (0,)
    steps = input.numel() // max(1, input.shape[-1])
    for i, weight in enumerate(weights):
        needs_grad = input.requires_grad if i in read_input else output[0].requires_grad
        macs = steps * weight.numel()
        yield Product("recurrent", input, weight, macs, input_needs_grad=needs_grad)


def _recurrent_cell(args: tuple[Any, ...], output: Any) -> Iterator[Product]:
    input, hidden, of_input, of_hidden = args[:4]
    hidden = hidden[0] if isinstance(hidden, tuple | list) else hidden
    for operand, weight in ((input, of_input), (hidden, of_hidden)):
        steps = operand.numel() // max(1, operand.shape[-1])
        yield Product("recurrent", operand, weight, steps * weight.numel())


def _einsum(args: tuple[Any, ...], is_weight: IsWeight) -> Iterator[Product]:
    """Operand after operand, from the left, however PyTorch orders them."""
    operands, terms, result = _einsum_terms(args)
    sizes: dict[Any, int] = {}
    for operand, term in zip(operands, terms, strict=True):
        for index, size in zip(term, operand.shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    left, indices, of_weights = operands[0], set(terms[0]), is_weight(operands[0])
    for i, (operand, term) in enumerate(zip(operands[1:], terms[1:], strict=True), start=1):
        macs = math.prod(sizes[index] for index in indices.union(term))
        if is_weight(operand):
            yield Product("product", left, operand, macs)
        elif of_weights:
            yield Product("product", operand, left, macs)
        if not is_weight(operand):
            left, of_weights = operand, False
        indices = indices.union(term).intersection(chain(result, *terms[i + 1 :]))


def _einsum_terms(args: tuple[Any, ...]) -> tuple[list[Tensor], list[list[Any]], list[Any]]:
    """Operands, the indices of each, and the indices of the result."""
    result: list[Any] | None
    if isinstance(args[0], str):
        operands = list(args[1]) if isinstance(args[1], list | tuple) else list(args[1:])
        sides = args[0].replace(" ", "").split("->")
        texts = [list(term.replace("...", ".")) for term in sides[0].split(",")]
        result = list(sides[1].replace("...", ".")) if len(sides) > 1 else None
    else:  # operand, indices, operand, indices, ..., [indices of the result]
        operands = list(args[0 : len(args) // 2 * 2 : 2])
        texts = [["." if i is ... else i for i in term] for term in args[1::2]][: len(operands)]
        last = args[-1] if len(args) % 2 else None
        result = None if last is None else ["." if i is ... else i for i in last]
    if result is None:
        every = list(chain(*texts))
        result = [".", *(i for i in every if every.count(i) == 1)]
    terms = []
    for operand, text in zip(operands, texts, strict=True):
        rest = operand.dim() - len([i for i in text if i != "."])
        wild = [(".", n) for n in range(rest, 0, -1)]  # counted from the right: they broadcast
        terms.append(list(chain.from_iterable(wild if i == "." else [i] for i in text)))
    most = max(
        (n for term in terms for i in term if isinstance(i, tuple) for n in i[1:]), default=0
    )
    kept = [(".", n) for n in range(1, most + 1)]
    return operands, terms, list(chain.from_iterable(kept if i == "." else [i] for i in result))
