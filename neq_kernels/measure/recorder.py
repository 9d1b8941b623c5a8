"""Which products with parameters a forward really computes: :mod:`neq_kernels.measure.flops` reads
it.

Functions are watched, not modules, so a weight that is used without calling its layer is counted
too, whichever function multiplies by it. What a weight became on the way there (a transpose, a
cast, a part, ``torch.where(mask, w, w.detach())``) counts as the parameter it came from.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from neq_kernels import functional
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.weight_reads import read_parameter
from neq_kernels.measure.products import Product, is_matrix_product, name_of, products_of

NORMS = (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm)
_LOOKUPS = ("embedding", "embedding_bag")


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, or one product with a parameter.

    Attributes:
        name: the module that owns the parameter, followed by the parameter's own name where that
            is not ``weight``.
        kind: ``conv``, ``linear``, ``norm``, ``bilinear``, ``recurrent`` or ``product``.
        owner: the module that owns the parameter.
        weight: the operand.
        macs: of the forward (whole batch), of which ``bias_macs`` add a bias.
        input_needs_grad: whether the other operand needs a gradient.
        parameter: what the weight is or came from; None for none of the model's.
        bypasses: a neuron layer owns the parameter, and this is no call of it: frozen neurons get
            a dense gradient.
        masked: frozen neurons are constants in the weight: its gradient is computed whole, and
            arrives at active neurons only.
        sequence: autograd's sequence number at the call: nodes made before have smaller ones.
    """

    name: str
    kind: str
    owner: nn.Module | None
    weight: Tensor | None
    macs: int
    bias_macs: int
    input_needs_grad: bool
    parameter: Parameter | None = None
    bypasses: bool = False
    masked: bool = False
    sequence: int = 0


class _Origin(NamedTuple):
    """The parameter a tensor was computed from; whether a reader of weights did it, who sees frozen
    neurons as constants; and whether they are constants in it, or in what it was computed from."""

    parameter: Parameter
    read: bool = False
    masked: bool = False


OnCall = Callable[[LayerCall, Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]


class Recorder(TorchFunctionMode):
    """Within it, ``calls`` collects what ``model`` computes with its parameters.

    Args:
        model: whose parameters give the names.
        on_call: called with each :class:`LayerCall`, the function, its arguments and its output.
    """

    def __init__(self, model: nn.Module, on_call: OnCall | None = None) -> None:
        super().__init__()
        self._on_call = on_call
        self.calls: list[LayerCall] = []
        self._module_names = {module: name for name, module in model.named_modules()}
        self._own = {m: dict(m.named_parameters(recurse=False)) for m in model.modules()}
        self._owners: dict[int, tuple[nn.Module, str]] = {}
        for module in reversed(list(self._own)):
            self._owners |= {id(p): (module, name) for name, p in self._own[module].items()}
        self._known = {id(p): p for own in self._own.values() for p in own.values()}
        # What a tensor was computed from: a parameter, or None for anything with data in it.
        self._origins = WeakTensorKeyDictionary()
        self._running: list[tuple[nn.Module | None, bool]] = [(None, False)]

    @contextmanager
    def watching(self, *inputs: Any) -> Iterator[None]:
        """Record, knowing which module each call comes from, and what the model's inputs are."""

        def enter(module: nn.Module, args: Any) -> None:
            needs_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            self._running.append((module, needs_grad))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()

        for tensor in _tensors(inputs):
            self._origins[tensor] = None
        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._sequence = torch._C._autograd._get_sequence_nr()
        output = func(*args, **kwargs)
        already = len(self.calls)
        if func in NORMS:
            self._norm(func, *args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self._multi_head_attention(*args, **kwargs)
        else:
            products = products_of(func, args, kwargs, output, self._is_weight)
            for product in products:
                self._record(product)
        self._note_origin(func, (args, kwargs), output, len(self.calls) > already)
        if self._on_call is not None:
            for call in self.calls[already:]:
                self._on_call(call, func, args, kwargs, output)
        return output

    def _note_origin(self, func: Any, inputs: Any, output: Any, is_product: bool) -> None:
        name = name_of(func)
        outputs = _tensors(inputs[0][0] if name == "setitem" else output)
        tensors = _tensors(inputs)
        if not outputs or not tensors:
            return
        origins = [found for t in tensors if (found := self._origin(t)) is not None]
        # Indices and masks made of data leave a weight a weight.
        data = [
            self._is_data(t)
            for t in tensors
            if t.is_floating_point() or t.is_complex() or name in _LOOKUPS or not origins
        ]
        origin = None
        if origins and not any(data) and not (is_product and not is_matrix_product(func)):
            largest = max((found.parameter for found in origins), key=Tensor.numel)
            read = any(found.read for found in origins)
            masked = read or name == "where" or any(found.masked for found in origins)
            origin = _Origin(largest, read, masked)
        elif not is_product and not any(data):
            return
        for tensor in outputs:
            if id(tensor) not in self._known:
                self._origins[tensor] = origin

    def _origin(self, tensor: Tensor) -> _Origin | None:
        read = read_parameter(tensor)
        known = self._known.get(id(read))
        if known is not None:
            return _Origin(known, read is not tensor)
        found: _Origin | None = self._origins.get(tensor)
        return found

    def _is_data(self, tensor: Tensor) -> bool:
        if self._origin(tensor) is not None:
            return False
        # What came out of a Function of somebody's was never seen.
        return tensor in self._origins or tensor.grad_fn is not None

    def _is_weight(self, tensor: Tensor) -> bool:
        return self._origin(tensor) is not None

    def _norm(self, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(func).bind(input, *args, **kwargs)
        self._add("norm", input, bound.arguments.get("weight"), 2 * input.numel())

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> None:
        """The four projections. The function hides its own calls, so they are worked out here."""
        called = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        inputs = [called["query"], called["key"], called["value"]]
        weights = [called.get(f"{name}_proj_weight") for name in ("q", "k", "v")]
        if not called.get("use_separate_proj_weight", False):
            weights = [called["in_proj_weight"]] * 3
        embed_dim = called["embed_dim_to_check"]
        for input, weight in zip(inputs, weights, strict=True):
            self._add("linear", input, weight, input.numel() * embed_dim, part="in_proj")
        out_weight = called["out_proj_weight"]
        needs_grad = any(t.requires_grad for t in (*inputs, *weights))
        macs = inputs[0].numel() // inputs[0].shape[-1] * out_weight.numel()
        self._add("linear", inputs[0], out_weight, macs, needs_grad=needs_grad)

    def _record(self, product: Product) -> None:
        self._add(
            product.kind,
            product.input,
            product.weight,
            product.macs,
            bias_macs=product.bias_macs,
            needs_grad=product.input_needs_grad,
        )

    def _add(
        self,
        kind: str,
        input: Tensor,
        weight: Tensor | None,
        macs: int,
        part: str | None = None,
        bias_macs: int = 0,
        needs_grad: bool | None = None,
    ) -> None:
        origin = None if weight is None else self._origin(weight)
        weight = read_parameter(weight)
        owner, parameter, local = self._owner(weight, origin and origin.parameter)
        of_owner = self._module_names.get(owner, "") if owner is not None else kind
        name = ".".join(filter(None, (of_owner, local if part is None else part))) or kind
        if needs_grad is None:
            running, module_needs_grad = self._running[-1]
            # Within an autograd Function the input may be a cast copy that is not in the graph.
            needs_grad = input.requires_grad or (owner is running and module_needs_grad)
        bypasses = (
            isinstance(owner, NeuronLayer)
            and not (origin is not None and origin.read)
            and not self._calls_its_layer(owner, parameter)
        )
        self.calls.append(
            LayerCall(
                *(name, kind, owner, weight, macs, bias_macs, needs_grad, parameter),
                bypasses=bypasses,
                # Of a weight that is read, a linear product is a call of its layer.
                masked=origin is not None and (origin.masked or (origin.read and kind != "linear")),
                sequence=self._sequence,
            )
        )

    def _owner(
        self, weight: Tensor | None, parameter: Parameter | None
    ) -> tuple[nn.Module | None, Parameter | None, str]:
        """Who owns the weight, the parameter it came from, and what to add to the owner's name."""
        running, _ = self._running[-1]
        owner, name = self._owners.get(id(parameter), (None, ""))
        if parameter is not None:
            for module, _ in reversed(self._running):  # a tied weight has several owners
                own = self._own.get(module, {}) if module is not None else {}
                names = [n for n, p in own.items() if p is parameter]
                if names:
                    owner, name = module, names[0]
                    break
        if owner is not running and self._stands_in(weight, running, owner):
            # Its weight is computed (weight norm), or others stand in for its parameters.
            own = self._own.get(running, {}) if running is not None else {}
            return running, own.get("weight") if parameter is None else parameter, ""
        return owner or running, parameter, name.removesuffix("weight").rstrip("_")

    def _stands_in(
        self, weight: Tensor | None, running: nn.Module | None, owner: nn.Module | None
    ) -> bool:
        if running is None or weight is None:
            return False
        own = getattr(running, "weight", None)
        inside = owner is None or owner in set(running.modules())
        return inside and isinstance(own, Tensor) and own.shape == weight.shape

    def _calls_its_layer(self, owner: NeuronLayer, parameter: Parameter | None) -> bool:
        """Whether a neuron layer that owns the parameter is running, or a function of ours."""
        for module, _ in self._running:
            if module is owner or (
                isinstance(module, NeuronLayer)
                and any(p is parameter for p, _ in module.neuron_parameters())
            ):
                return True
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_globals.get("__name__") == functional.__name__:
                return True
        return False


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def batch_size(example: Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]) -> int:
    """Images in ``example``: the first dimension of its first tensor of any dimension.

    Raises:
        ValueError: no such tensor, or it is empty.
    """
    if isinstance(example, Tensor):
        tensors: list[Any] = [example]
    else:
        tensors = list(example.values()) if isinstance(example, dict) else list(example[:1])
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim() and math.prod(tensor.shape):
            return tensor.shape[0]
    raise ValueError("example: expected a non-empty tensor with a batch dimension")
