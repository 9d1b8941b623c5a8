"""The backward of one layer, on the selected backend with the selected kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from neq_kernels.backends.base import BackwardCall, Grads
from neq_kernels.backends.problem import ConvGeometry, KernelChoice, Problem, Strategy
from neq_kernels.channels import Active, ActiveChannels, NeuronLayout
from neq_kernels.dispatch.contests import Contest
from neq_kernels.dispatch.cuda_graphs import clear_frozen
from neq_kernels.dispatch.execution_context import ExecutionContext
from neq_kernels.dispatch.selection import selector

_DENSE = KernelChoice(Strategy.DENSE)


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    active: Active,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        active: the active features, on the weight's device.
        active_dgrad: only active features propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.linear_backward``.

    Raises:
        RuntimeError: ``active_dgrad`` while a CUDA graph is captured.
    """
    k = weight.shape[0]
    context = selector.context(weight.device.type)
    replayed, choice = selector.rehearsal.captures(weight), _DENSE
    if replayed or (0 < active.n < k and (output_mask[1] or output_mask[2])):
        problem = Problem.linear(grad_output.numel() // max(1, k), weight)
        if replayed:
            _refuse_active_dgrad(active_dgrad and output_mask[0])
            choice = selector.choice_in_graph(problem, context, output_mask)
            active = replace(active, n=k, start=-1)
        else:
            choice = _chosen(problem, active, context)
    backend = selector.backend_of(choice, context)
    grad_input = None
    if active_dgrad and output_mask[0] and active.n < k:
        grad_input = backend.linear_active_dgrad(grad_output, weight, input_size, active)
        output_mask = (False, *output_mask[1:])
    grads = backend.linear_backward(
        grad_output,
        input,
        weight,
        output_mask,
        input_size=input_size,
        active=active,
        choice=choice,
    )
    if replayed and choice.strategy == Strategy.DENSE:
        clear_frozen(grads, NeuronLayout(), active.order, active.count)
    return grads if grad_input is None else (grad_input, *grads[1:])


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    active: Active,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """As :func:`linear_backward`, for a convolution of batched images."""
    k = grad_output.shape[1]
    context = selector.context(weight.device.type)
    replayed, choice = selector.rehearsal.captures(weight), _DENSE
    if replayed or (active.n > 0 and output_mask[1]):
        if replayed:
            _refuse_active_dgrad(active_dgrad and output_mask[0])
        if input is not None:
            problem = Problem.conv(input, weight, geometry)
            if replayed:
                choice = selector.choice_in_graph(problem, context, output_mask)
            else:
                choice = _chosen(problem, active, context)
        if replayed:
            active = replace(active, n=k, start=-1)
    backend = selector.backend_of(choice, context)
    grad_input = None
    if active_dgrad and output_mask[0] and active.n < k:
        grad_input = backend.conv_active_dgrad(
            grad_output, input, weight, input_size, geometry, active
        )
        output_mask = (False, *output_mask[1:])
    grads = backend.conv_backward(
        grad_output,
        input,
        weight,
        output_mask,
        input_size=input_size,
        geometry=geometry,
        active=active,
        choice=choice,
    )
    if replayed and choice.strategy == Strategy.DENSE:
        clear_frozen(grads, geometry.layout, active.order, active.count)
    return grads if grad_input is None else (grad_input, *grads[1:])


def _refuse_active_dgrad(is_asked: bool) -> None:
    if is_asked:
        raise RuntimeError(
            'grad_input: expected "exact" while a CUDA graph is captured, got "active", which '
            "would go on propagating from the channels that are active now"
        )


def _chosen(problem: Problem, active: Active, context: ExecutionContext) -> KernelChoice:
    """In a backward that is not planned."""
    if active.dense:
        return _DENSE
    if active.n < problem.neurons:
        selector.costs.calibrate(context)
    return selector.choice(problem, active.n, context)


class _Undecided:
    """The backward of a layer whose kernel is chosen in its first call.

    Args:
        call_of: the backward by a kernel.
        settle: is given the backward to call from then on, once nothing is measured any more.
    """

    def __init__(
        self,
        problem: Problem,
        n: int,
        context: ExecutionContext,
        call_of: Callable[[KernelChoice], BackwardCall],
        settle: Callable[[BackwardCall], None],
    ) -> None:
        self._problem, self._n, self._context = problem, n, context
        self._call_of, self._settle = call_of, settle
        self._contest: Contest | None = None

    def __call__(
        self,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor,
        output_mask: Sequence[bool],
    ) -> Grads:
        if self._contest is None:
            choice, self._contest = selector.decide(self._problem, self._n, self._context)
            if self._contest is None:
                call = self._call_of(choice)
                self._settle(call)
                return call(grad_output, input, weight, output_mask)
        contest = self._contest
        grads = contest.run(self._call_of, grad_output, input, weight, output_mask)
        if contest.is_over:
            self._settle(self._call_of(contest.predicted))
        return grads


def _no_matter(call: BackwardCall) -> None:
    """Go on with what there is."""


def linear_call(
    input: Tensor,
    weight: Tensor,
    channels: ActiveChannels,
    settle: Callable[[BackwardCall], None] = _no_matter,
    in_float: bool = False,
) -> BackwardCall:
    """The backward of a linear layer: for as long as shapes, ``channels`` and
    ``selector.revision`` do not change.

    Args:
        settle: is given a quicker one to call instead, as soon as there is one.
        in_float: see :meth:`neq_kernels.backends.base.Backend.linear_call`.
    """
    context = selector.context(weight.device.type)
    active, size = channels.on(weight.device), input.shape
    problem = Problem.linear(input.numel() // max(1, weight.shape[1]), weight)

    def call_of(choice: KernelChoice) -> BackwardCall:
        backend = selector.backend_of(choice, context)
        return backend.linear_call(weight, size, active, choice, in_float)

    return _decided(problem, active, context, call_of, settle)


def conv_call(
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    channels: ActiveChannels,
    settle: Callable[[BackwardCall], None] = _no_matter,
    in_float: bool = False,
) -> BackwardCall:
    """As :func:`linear_call`, for a convolution of batched images."""
    context = selector.context(weight.device.type)
    active, size = channels.on(weight.device), input.shape
    problem = Problem.conv(input, weight, geometry)

    def call_of(choice: KernelChoice) -> BackwardCall:
        backend = selector.backend_of(choice, context)
        return backend.conv_call(weight, size, geometry, active, choice, in_float)

    return _decided(problem, active, context, call_of, settle)


def _decided(
    problem: Problem,
    active: Active,
    context: ExecutionContext,
    call_of: Callable[[KernelChoice], BackwardCall],
    settle: Callable[[BackwardCall], None],
) -> BackwardCall:
    if active.n == 0 or active.dense:
        return call_of(_DENSE)
    if context.device_type == "cpu" and context.measures:
        return _Undecided(problem, active.n, context, call_of, settle)
    return call_of(selector.choice(problem, active.n, context))


def replaces_dense(input: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a convolution with every channel active is expected to be clearly faster by a custom
    kernel than by PyTorch's: on the CPU alone, where that was measured."""
    context = selector.context(weight.device.type)
    if context.backends != ("cpu",):
        return False
    problem = Problem.conv(input, weight, geometry)
    return selector.choice(problem, problem.neurons, context).strategy != Strategy.DENSE


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """See :func:`neq_kernels.ops.channel_similarity`."""
    name = selector.backends_for(a.device.type)[0]
    return selector.backends[name].channel_similarity(a, b, dim)
