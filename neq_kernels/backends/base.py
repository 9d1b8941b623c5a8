"""The contract of a backend: gradients of layers, and row steps of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.channels import Active, NeuronLayout

# The gradients of input, weight and bias, None where they were not asked for.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
# Of grad_output, input (None where only its shape matters), weight and output_mask.
BackwardCall = Callable[[Tensor, Tensor | None, Tensor, Sequence[bool]], Grads]

# What row steps are told of a parameter group.
SGD_SETTINGS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM_SETTINGS = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize")


class Backend(ABC):
    """Computes gradients and row steps in one way.

    Attributes:
        name: as ``NEQ_KERNELS_BACKEND`` calls it.
        for_gpus: its custom kernels read the number of active channels on the device.
    """

    name: ClassVar[str]
    for_gpus: ClassVar[bool] = False

    @abstractmethod
    def unavailable(self) -> str | None:
        """None when the backend can be used, else the reason why not."""

    @abstractmethod
    def supports(self, device_type: str) -> bool:
        """Whether it takes tensors of this device type."""

    @abstractmethod
    def strategies(self, problem: Problem) -> tuple[Strategy, ...]:
        """The strategies that can compute this weight gradient."""

    def settings(self, problem: Problem, n: int) -> tuple[tuple[int, ...], ...]:
        """Ways of running the custom kernel that are worth a measurement, the default one first."""
        return ((),)

    def build(self) -> str:
        """Names this build of the custom kernels: another one may behave differently."""
        return ""

    def built_with(self) -> dict[str, str]:
        """What a measurement of its kernels was made with, besides PyTorch and the device."""
        return {}

    @abstractmethod
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
        """Gradients of a linear layer, in the layout of the weight; the input's is exact.

        Args:
            grad_output: ``[..., K]``.
            input: ``[..., C]``, or None where the weight gradient is not asked for.
            weight: ``[K, C]``.
            output_mask: which of the gradients of input, weight and bias to compute.
            input_size: of ``input``.
            active: the active features; rows of the others are exactly 0.
            choice: one of this backend's strategies, with its settings.
        """

    @abstractmethod
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
        """Gradients of a convolution of batched images; as :meth:`linear_backward`."""

    def linear_call(
        self,
        weight: Tensor,
        input_size: Sequence[int],
        active: Active,
        choice: KernelChoice,
        in_float: bool = False,
    ) -> BackwardCall:
        """:meth:`linear_backward` with everything but the tensors decided.

        Args:
            in_float: gradients of weight and bias are welcome in float32, whatever the operands
                are: autocast has made these of float32 parameters.
        """
        return partial(self.linear_backward, input_size=input_size, active=active, choice=choice)

    def conv_call(
        self,
        weight: Tensor,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
        choice: KernelChoice,
        in_float: bool = False,
    ) -> BackwardCall:
        """:meth:`conv_backward` with everything but the tensors decided; as :meth:`linear_call`."""
        return partial(
            self.conv_backward,
            input_size=input_size,
            geometry=geometry,
            active=active,
            choice=choice,
        )

    @abstractmethod
    def linear_active_dgrad(
        self, grad_output: Tensor, weight: Tensor, input_size: Sequence[int], active: Active
    ) -> Tensor:
        """The input gradient that the active features alone propagate."""

    @abstractmethod
    def conv_active_dgrad(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        input_size: Sequence[int],
        geometry: ConvGeometry,
        active: Active,
    ) -> Tensor | None:
        """The input gradient that the active channels alone propagate."""

    @abstractmethod
    def channel_similarity(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        """float64 ``[3, K]``: sums of ``a*b``, ``a*a``, ``b*b`` over all dimensions but ``dim``."""

    def supports_row_steps(self, parameter: Tensor, layout: NeuronLayout) -> bool:
        """Whether one call can step this parameter with others; its gradient and state have to lie
        in memory as it does."""
        return False

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
        """``optim.reference.sgd_rows_`` of many parameters of one dtype on one device, in place;
        each parameter's tensors have equal strides.

        Args:
            momentum_buffers, steps: one for each parameter, or none at all.
            orders, n: the active neurons of each parameter first, and how many they are.
            blocks: ``layout.blocks(param)`` of all parameters, one after the other.
            settings: ``SGD_SETTINGS``.
        """
        raise NotImplementedError(f"the backend {self.name} has no row steps")

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
        """``optim.reference.adam_rows_`` of many parameters; as :meth:`sgd_rows_`.

        Args:
            max_exp_avg_sqs: one for each parameter, or none at all.
            settings: ``ADAM_SETTINGS``.
        """
        raise NotImplementedError(f"the backend {self.name} has no row steps")


def in_layout_of(weight: Tensor, grad_weight: Tensor | None) -> Tensor | None:
    """The gradient with the strides of the weight, copied only if it has others."""
    if grad_weight is None or grad_weight.stride() == weight.stride():
        return grad_weight
    return torch.empty_like(weight).copy_(grad_weight)


def shape_only(grad_output: Tensor, input: Tensor | None, input_size: Sequence[int]) -> Tensor:
    """``input``, or a tensor of its shape without memory of its own where it was not saved."""
    return grad_output.new_empty(1).expand(input_size) if input is None else input
