"""Which layers a forward really calls, and their MACs: :mod:`neq_kernels.measure.flops` reads it.

Functions are watched, not modules, so a layer whose weight is used functionally (torchvision's
Swin attention, ``nn.MultiheadAttention``) is counted too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from neq_kernels.layers.weight_reads import read_parameter

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_CONVOLUTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PRODUCTS = (F.linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
NORMS = (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm)


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its name, ``conv``, ``linear`` or ``norm``, the module that owns its
    weight, the MACs of its forward (whole batch), how many of them add a bias, and whether its
    input needs a gradient."""

    name: str
    kind: str
    owner: nn.Module | None
    weight: Tensor | None
    macs: int
    bias_macs: int
    input_needs_grad: bool


OnCall = Callable[[LayerCall, Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]


class Recorder(TorchFunctionMode):
    """Within it, ``calls`` collects what ``model`` computes by conv, linear and norm functions.

    Args:
        model: whose layers give the names.
        on_call: called with each :class:`LayerCall`, the function, its arguments and its output.
    """

    def __init__(self, model: nn.Module, on_call: OnCall | None = None) -> None:
        super().__init__()
        self._on_call = on_call
        self.calls: list[LayerCall] = []
        self._module_names = {module: name for name, module in model.named_modules()}
        self._owners = {
            id(parameter): module
            for module in reversed(list(model.modules()))
            for parameter in module.parameters(recurse=False)
        }
        self._running: list[tuple[nn.Module | None, bool]] = [(None, False)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record, knowing which module each call comes from."""

        def enter(module: nn.Module, args: Any) -> None:
            needs_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            self._running.append((module, needs_grad))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()

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
        output = func(*args, **kwargs)
        already = len(self.calls)
        if func is F.linear:
            self._linear(output, *args, **kwargs)
        elif func in CONVOLUTIONS:
            self._conv(output, *args, **kwargs)
        elif func in TRANSPOSED_CONVOLUTIONS:
            self._conv_transpose(output, *args, **kwargs)
        elif func in NORMS:
            self._norm(func, *args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self._multi_head_attention(*args, **kwargs)
        if self._on_call is not None:
            for call in self.calls[already:]:
                self._on_call(call, func, args, kwargs, output)
        return output

    def _linear(self, output: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> None:
        self._record("linear", input, weight, input.shape[-1] * output.numel())

    def _conv(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Any = None, *_: Any, **__: Any
    ) -> None:
        macs = output.numel() * weight[0].numel()
        self._record("conv", input, weight, macs, bias_macs=_adds(bias, output))

    def _conv_transpose(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Any = None, *_: Any, **__: Any
    ) -> None:
        macs = input.numel() * weight[0].numel()
        self._record("conv", input, weight, macs, bias_macs=_adds(bias, output))

    def _norm(self, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(func).bind(input, *args, **kwargs)
        self._record("norm", input, bound.arguments.get("weight"), 2 * input.numel())

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> None:
        """The four projections. The function hides its own calls, so they are worked out here."""
        called = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        inputs = [called["query"], called["key"], called["value"]]
        weights = [called.get(f"{name}_proj_weight") for name in ("q", "k", "v")]
        if not called.get("use_separate_proj_weight", False):
            weights = [called["in_proj_weight"]] * 3
        embed_dim = called["embed_dim_to_check"]
        for input, weight in zip(inputs, weights, strict=True):
            self._record("linear", input, weight, input.numel() * embed_dim, "in_proj")
        out_weight = called["out_proj_weight"]
        needs_grad = any(t.requires_grad for t in (*inputs, *weights))
        macs = inputs[0].numel() // inputs[0].shape[-1] * out_weight.numel()
        self._record("linear", inputs[0], out_weight, macs, needs_grad=needs_grad)

    def _record(
        self,
        kind: str,
        input: Tensor,
        weight: Tensor | None,
        macs: int,
        part: str = "",
        bias_macs: int = 0,
        needs_grad: bool | None = None,
    ) -> None:
        weight = read_parameter(weight)
        owner = self._owner(weight)
        name = self._module_names.get(owner, "") if owner is not None else kind
        name = ".".join(filter(None, (name, part))) or kind
        if needs_grad is None:
            running, module_needs_grad = self._running[-1]
            # Within an autograd Function the input may be a cast copy that is not in the graph.
            needs_grad = input.requires_grad or (owner is running and module_needs_grad)
        self.calls.append(
            LayerCall(name, kind, owner, weight, macs + bias_macs, bias_macs, needs_grad)
        )

    def _owner(self, weight: Tensor | None) -> nn.Module | None:
        """The running module if the weight has the shape of its own (a converted layer may pass an
        alias of its parameter, a tied weight has several owners), else whoever registered it."""
        running, _ = self._running[-1]
        own = getattr(running, "weight", None)
        if weight is None or (isinstance(own, Tensor) and own.shape == weight.shape):
            return running
        return self._owners.get(id(weight), running)


def _adds(bias: Tensor | None, output: Tensor) -> int:
    return 0 if bias is None else output.numel()


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
