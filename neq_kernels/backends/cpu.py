"""The C++ extension, for CPU tensors: custom kernels, and what ``backends.aten`` does in one call.

``NEQ_KERNELS_LIBRARY`` names another build of the extension to load (the sanitizer tests do).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends.aten import Aten, count_write
from neq_kernels.backends.base import (
    ADAM_SETTINGS,
    SGD_SETTINGS,
    BackwardCall,
    Grads,
    in_layout_of,
    shape_only,
)
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.channels import Active, NeuronLayout

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_LIBRARY"
_LIBRARY = Path(__file__).parent.parent / "_C.so"

_CUSTOM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROW_STEP_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_leaf = torch.ops.neq_kernels_cpu


class Cpu(Aten):
    """The C++ extension's kernels."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return _load()

    def supports(self, device_type: str) -> bool:
        return device_type == "cpu"

    def capability(self) -> str:
        """The instruction set in use: one of those of ``NEQ_KERNELS_CPU_CAPABILITY``."""
        name: str = _leaf.capability()
        return name

    def built_with(self) -> dict[str, str]:
        return {"kernels": self.capability()}

    def strategies(self, problem: Problem) -> tuple[Strategy, ...]:
        usable = super().strategies(problem)
        is_plain = problem.geometry is None or problem.is_plain_conv2d
        if problem.is_depthwise or (is_plain and problem.dtype in _CUSTOM_DTYPES):
            return *usable, Strategy.CUSTOM
        return usable

    # --- gradients -------------------------------------------------------------------------------

    def linear_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        """As that of ``aten``; what there is to save, in one call of the extension."""
        saves = 0 < active.n < len(active.order) and (output_mask[1] or output_mask[2])
        if saves and weight.is_contiguous():
            call = self.linear_call(weight, input_size, active, choice)
            return call(grad_output, input, weight, output_mask)
        return super().linear_backward(
            grad_output,
            input,
            weight,
            output_mask,
            input_size=input_size,
            active=active,
            choice=choice,
        )

    def linear_call(
        self,
        weight: Tensor,
        input_size: Sequence[int],
        active: Active,
        choice: KernelChoice,
        in_float: bool = False,
    ) -> BackwardCall:
        if not weight.is_contiguous():
            return super().linear_call(weight, input_size, active, choice)
        leaf, order = _leaf.linear_backward.default, active.order
        numbers = _numbers(choice.strategy.value, active.n, active.start, int(in_float))

        def call(
            grad_output: Tensor, input: Tensor | None, weight: Tensor, output_mask: Sequence[bool]
        ) -> Grads:
            x = grad_output if input is None else input
            first, second, third = output_mask
            grads: Grads = leaf(grad_output, x, weight, order, numbers, first, second, third)
            return grads

        return call

    def conv_backward(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
        *,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
        choice: KernelChoice,
    ) -> Grads:
        """As that of ``aten``; what there is to save, in one call of the extension."""
        saves = active.n < len(active.order) or choice.strategy != Strategy.DENSE
        saves = saves and active.n > 0 and (output_mask[1] or output_mask[2])
        if saves and _in_one_call(weight, geometry, active, choice):
            call = self.conv_call(weight, input_size, geometry, active, choice)
            return call(grad_output, input, weight, output_mask)
        return super().conv_backward(
            grad_output,
            input,
            weight,
            output_mask,
            input_size=input_size,
            geometry=geometry,
            active=active,
            choice=choice,
        )

    def conv_call(
        self,
        weight: Tensor,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
        choice: KernelChoice,
        in_float: bool = False,
    ) -> BackwardCall:
        if not _in_one_call(weight, geometry, active, choice):
            return super().conv_call(weight, input_size, geometry, active, choice)
        leaf, order = _leaf.conv_backward.default, active.order
        numbers = _numbers(choice.strategy.value, active.n, int(in_float), *_flat(geometry))
        densely = super().conv_backward

        def call(
            grad_output: Tensor, input: Tensor | None, weight: Tensor, output_mask: Sequence[bool]
        ) -> Grads:
            if output_mask[2] and not output_mask[1] and geometry.groups > 1:  # the bias alone
                return densely(
                    grad_output,
                    input,
                    weight,
                    output_mask,
                    input_size=input_size,
                    geometry=geometry,
                    active=active,
                    choice=KernelChoice(Strategy.DENSE),
                )
            x = shape_only(grad_output, input, input_size) if input is None else input
            first, second, third = output_mask
            dx, dw, db = leaf(grad_output, x, weight, order, numbers, first, second, third)
            if dw is not None and dw.stride() != weight.stride():  # PyTorch's own
                dw = in_layout_of(weight, dw)
            return dx, dw, db

        return call

    # --- packing and scattering ------------------------------------------------------------------

    def pack(self, t: Tensor, order: Tensor, n: int, dim: int) -> Tensor:
        """Channels ``order[:n]`` of ``t`` along ``dim``, in ``t``'s own memory format.

        Raises:
            ValueError: an index, ``n`` or ``dim`` out of range, ``order`` no int64 vector, or a
                tensor that is not on the CPU.
        """
        packed: Tensor = _leaf.pack(t, order, n, dim)
        return packed

    def scatter_rows(
        self, rows: Tensor, like: Tensor, order: Tensor, n: int, layout: NeuronLayout
    ) -> Tensor:
        """A tensor like ``like``: neurons ``order[:n]`` hold ``rows``, the others are 0.

        Args:
            rows: as ``like`` but with n neurons, or, for ``layout.groups > 1``, ``layout.gather``'s
                shape; any floating dtype and strides.
            like: gives shape, strides and dtype.
            order: int64[K], every neuron once.

        Raises:
            ValueError: ``order`` is no permutation, or a shape or dtype that does not fit.
        """
        blocks = layout.blocks(like)
        if blocks is None:
            dense = like.new_empty(like.shape)
            return torch.empty_like(like).copy_(self.scatter_rows(rows, dense, order, n, layout))
        scattered: Tensor = _leaf.scatter_rows(rows, like, order, n, *blocks)
        return scattered

    def depthwise_wgrad(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        order: Tensor,
        n: int,
        want_bias: bool,
    ) -> tuple[Tensor, Tensor]:
        """Weight rows and bias entries of channels ``order[:n]`` of a 2d depthwise convolution.

        Args:
            grad_output: ``[N, K, P, Q]``, K a multiple of Cin; any strides, NCHW and channels_last
                without a copy.
            input: ``[N, Cin, H, W]`` of the same dtype (half types are summed in float32).
            weight_shape: ``(K, 1, kH, kW)``.
            stride, padding, dilation: two integers each.
            order: int64, its first ``n`` entries in [0, K).

        Returns:
            ``rows [n, 1, kH, kW]`` and ``bias [n]`` (empty unless ``want_bias``), of ``input``'s
            dtype. The bits do not depend on the number of threads. NaN and Inf of an inactive
            channel are never read into another channel's sums; Inf in an active channel's own input
            may turn neighbouring taps of that channel into NaN.

        Raises:
            ValueError: shapes, dtypes or indices that do not fit.
        """
        wgrad: tuple[Tensor, Tensor] = _leaf.depthwise_wgrad(
            grad_output, input, weight_shape, stride, padding, dilation, order, n, want_bias
        )
        return wgrad

    # --- row steps -------------------------------------------------------------------------------

    def supports_row_steps(self, parameter: Tensor, layout: NeuronLayout) -> bool:
        return (
            parameter.is_cpu
            and parameter.dtype in _ROW_STEP_DTYPES
            and layout.blocks(parameter) is not None
        )

    def sgd_rows_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        steps: Sequence[Tensor],
        orders: Sequence[Tensor],
        n: Sequence[int],
        blocks: Sequence[int],
        **settings: Any,
    ) -> None:
        """As the base class says.

        Raises:
            ValueError: a tensor, order or number that does not fit; nothing has been written then.
        """
        tensors = (params, grads, momentum_buffers, steps, orders)
        _leaf.sgd_rows_.default(*tensors, n, blocks, *(settings[name] for name in SGD_SETTINGS))
        count_write(params, momentum_buffers, steps)

    def adam_rows_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        orders: Sequence[Tensor],
        n: Sequence[int],
        blocks: Sequence[int],
        **settings: Any,
    ) -> None:
        """As :meth:`sgd_rows_`."""
        tensors = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, orders)
        _leaf.adam_rows_.default(*tensors, n, blocks, *(settings[name] for name in ADAM_SETTINGS))
        count_write(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)


@functools.cache
def _load() -> str | None:
    """Load the extension; returns the reason if it cannot be."""
    library = os.environ.get(ENVIRONMENT_VARIABLE)
    if library is None and not _LIBRARY.exists():
        return "the C++ extension was not built when neq_kernels was installed"
    try:
        torch.ops.load_library(library or str(_LIBRARY))
    except OSError as error:
        return f"the C++ extension cannot be loaded: {error}"
    return None


def _in_one_call(
    weight: Tensor, geometry: ConvGeometry, active: Active, choice: KernelChoice
) -> bool:
    """Whether the extension computes all gradients of such a convolution."""
    plain = geometry.groups == 1 or choice.strategy == Strategy.CUSTOM or active.n == 0
    return plain and geometry.layout.blocks(weight) is not None


def _flat(geometry: ConvGeometry) -> tuple[int, ...]:
    g = geometry
    return g.groups, int(g.transposed), *g.stride, *g.padding, *g.dilation, *g.output_padding


@functools.lru_cache(maxsize=8192)
def _numbers(*numbers: int) -> Tensor:
    """Numbers for the extension: one tensor is read faster than many arguments."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")
