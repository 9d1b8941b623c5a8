"""SGD, Adam and AdamW for the parameters neurons own, and the state of frozen neurons.

While all neurons of a parameter are active and share one history, torch's own step does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from neq_kernels.backends.base import Backend
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.dispatch.selection import selector
from neq_kernels.optim import reference
from neq_kernels.optim.multi_tensor import Batches, RowStep, ScalarSteps
from neq_kernels.optim.ownership import OwnedParameter
from neq_kernels.optim.step_counts import COUNTS, State, as_digits, counts_from
from neq_kernels.sharding import is_distributed, local, placed_alike

FrozenState = Literal["reset", "keep", "reference"]
Group = dict[str, Any]
Flags = dict[str, Any]


@dataclass
class GroupPlan:
    """How the parameters of one group that take row steps are stepped until something changes.

    Attributes:
        group: its settings are read anew at every step.
        batches: the row steps of active neurons.
        counted: of sharded parameters: the counts of all neurons, of which a row step sees a copy
            of those in this process, and which of them are active.
        advancing: parameters whose frozen neurons' state goes on ("reference").
        scalars: the scalar ``step`` of each parameter that has one.
        waiting: parameters whose scalar does not advance yet.
        scalar_steps: the others' scalars; None to have both found anew.
    """

    group: Group
    batches: Batches
    counted: list[tuple[Tensor, Tensor]]
    advancing: list[tuple[Parameter, OwnedParameter, State]]
    scalars: dict[Parameter, Tensor]
    waiting: list[Parameter] = field(default_factory=list)
    scalar_steps: ScalarSteps | None = None


class RowSteps:
    """Row steps of one optimizer.

    Args:
        optimizer: whose state and parameter groups are used.
        frozen_state: what happens to the state of a frozen neuron.
        frees: whether the state of a wholly frozen parameter is freed (under "reset").
    """

    # The name of the row function.
    function: str
    # State set to 0 when a neuron freezes: under "reset", and under "reference".
    reset: tuple[str, ...]
    reference: tuple[str, ...]

    def __init__(self, optimizer: Optimizer, frozen_state: FrozenState, frees: bool) -> None:
        self._optimizer = optimizer
        self._frees = frees
        # The bytes of each parameter's state when it was freed.
        self._freed: dict[Parameter, int] = {}
        self._frozen_state = frozen_state
        self._applied: dict[Parameter, tuple[ActiveChannels, int, Tensor | None]] = {}
        # How many steps the most advanced active neuron lies behind the most advanced of all.
        self._behind: dict[Parameter, int] = {}

    def forget(self) -> None:
        """The state was replaced: what was done to it has to be done again."""
        self._applied.clear()
        self._behind.clear()

    def freed_bytes(self) -> int:
        """Of the state that is not there now."""
        return sum(n for p, n in self._freed.items() if not self._optimizer.state.get(p))

    def leaves_to_torch(self, group: Group, p: Parameter, owned: OwnedParameter) -> bool:
        """Whether torch's own step is the row step of this parameter."""
        return owned.all_active and COUNTS not in self._optimizer.state.get(p, ())

    def flags(self, group: Group) -> Flags:
        """The group's settings as numbers, as the row functions take them."""
        raise NotImplementedError

    def make_all_state(self, parameters: Mapping[Parameter, OwnedParameter]) -> None:
        """Make the state and the counts of all that row steps support, whatever is active."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                owned = parameters.get(p)
                if owned is None or not p.requires_grad or not self.is_stateful(group):
                    continue
                if not group_refusal(group) and not parameter_refusal(p):
                    self.prepare(group, p, owned, self._optimizer.state[p])

    def saved_state(self, group: Group, p: Parameter, owned: OwnedParameter) -> State:
        """The state as a checkpoint holds it: with the counts, if the group's steps count, and
        with zeros for a parameter that has none because it was wholly frozen, and maybe is."""
        state = dict(self._optimizer.state.get(p, {}))
        was_frozen = owned.none_active or bool(self._optimizer.state)
        if not state and self.is_stateful(group) and p.requires_grad and was_frozen:
            self.prepare(group, p, owned, state)
        if state and self.counts(group):
            state[COUNTS] = as_digits(state.get(COUNTS), len(owned.channels), p.device)
        return state

    def plan(self, group: Group, own: Mapping[Parameter, OwnedParameter]) -> GroupPlan:
        """How these parameters of a group are stepped, from now on until something changes. Makes
        the state that is missing and does to the state of frozen neurons what is due."""
        advances_frozen = self._frozen_state == "reference"
        steps: list[RowStep] = []
        counted: list[tuple[Tensor, Tensor]] = []
        advancing = []
        scalars = {}
        for p, owned in own.items():
            wholly_frozen = owned.none_active
            state = self._optimizer.state.get(p, {})
            is_stepped = advances_frozen if wholly_frozen else p.grad is not None
            if wholly_frozen and self._frees and state:
                tensors = [local(t) for t in state.values() if isinstance(t, Tensor)]
                self._freed[p] = sum(t.numel() * t.element_size() for t in tensors)
                del self._optimizer.state[p]
                self._applied.pop(p, None)
                continue
            if not is_stepped and not state:
                continue
            if self.is_stateful(group):
                state = self._optimizer.state[p]
                self.prepare(group, p, owned, state)
                self._apply_frozen_state(p, owned, state)
            if not is_stepped:
                continue
            if p.grad is not None and not wholly_frozen:
                self._add_row_step(steps, counted, group, p, owned, state)
            if advances_frozen:
                advancing.append((p, owned, state))
                self._behind[p] = 0
            if "step" in state:
                scalars[p] = state["step"]
        return GroupPlan(group, Batches(self.function, steps), counted, advancing, scalars)

    def step(self, plan: GroupPlan) -> None:
        """One step of one group, in place."""
        flags = self.flags(plan.group)
        plan.batches.run(flags)
        for counts, active in plan.counted:
            counts[active] += 1
        for p, owned, state in plan.advancing:
            self._advance_frozen(flags, p, owned, state)
        if plan.scalars:
            self._advance_scalars(plan)

    def is_stateful(self, group: Group) -> bool:
        """Whether steps of this group keep state."""
        raise NotImplementedError

    def counts(self, group: Group) -> bool:
        """Whether steps of this group are counted neuron by neuron."""
        raise NotImplementedError

    def prepare(self, group: Group, p: Parameter, owned: OwnedParameter, state: State) -> None:
        """Make the state that is missing, as torch would."""
        raise NotImplementedError

    def row_state(self, group: Group, state: State) -> tuple[Tensor | None, ...]:
        """The state tensors in the order the row functions take them."""
        raise NotImplementedError

    def decay(self, flags: Flags, p: Parameter, owned: OwnedParameter, state: State) -> None:
        """What "reference" does to the frozen neurons at every step."""

    def _apply_frozen_state(self, p: Parameter, owned: OwnedParameter, state: State) -> None:
        channels, counts = owned.channels, state.get(COUNTS)
        seen = self._applied.get(p)
        if seen and seen[0] is channels and seen[1] == channels.generation and seen[2] is counts:
            return
        frozen = owned.channels.order(p.device)[channels.n_active :]
        here = owned.rows_here(p)
        zeroed = {"reset": self.reset, "reference": self.reference, "keep": ()}
        for key in zeroed[self._frozen_state]:
            if isinstance(state.get(key), Tensor):
                here.layout.fill_(local(state[key]), here.frozen, 0)
        if counts is not None:
            if self._frozen_state == "reset":
                counts[frozen] = 0
            if "step" in state:
                largest = int(counts.max())
                state["step"].fill_(largest)
                active = counts[channels.order(p.device)[: channels.n_active]]
                self._behind[p] = largest - int(active.max()) if len(active) else 0
        self._applied[p] = (channels, channels.generation, counts)

    def _advance_frozen(
        self, flags: Flags, p: Parameter, owned: OwnedParameter, state: State
    ) -> None:
        if COUNTS in state:
            state[COUNTS][owned.channels.order(p.device)[owned.channels.n_active :]] += 1
        self.decay(flags, p, owned, state)

    def _advance_scalars(self, plan: GroupPlan) -> None:
        """The scalar step is the largest count: it waits while active neurons catch up."""
        if plan.scalar_steps is None:
            plan.waiting = [p for p in plan.scalars if self._behind[p]]
            plan.scalar_steps = ScalarSteps(
                [scalar for p, scalar in plan.scalars.items() if not self._behind[p]]
            )
        plan.scalar_steps.advance()
        for p in plan.waiting:
            self._behind[p] -= 1
            if not self._behind[p]:
                plan.scalar_steps = None

    def _add_row_step(
        self,
        steps: list[RowStep],
        counted: list[tuple[Tensor, Tensor]],
        group: Group,
        p: Parameter,
        owned: OwnedParameter,
        state: State,
    ) -> None:
        here, counts = owned.rows_here(p), state.get(COUNTS)
        tensors = [t if t is None else local(t) for t in self.row_state(group, state)]
        if here.numbers is not None and counts is not None:
            counted.append((counts, owned.channels.order(p.device)[: owned.channels.n_active]))
            here_counts = counts[here.numbers.to(p.device)]
            tensors = [here_counts if t is counts else t for t in tensors]
        assert p.grad is not None
        alike = [t for t in tensors if t is not None and t.dtype != torch.int64]
        backend = None
        if here.n and placed_alike(p.grad, p):
            backend = _backend([local(p), local(p.grad), *alike], here.layout)
        steps.append(RowStep(p, tuple(tensors), here.order, here.n, here.layout, backend))


class SGDRows(RowSteps):
    """``torch.optim.SGD``. Counts are kept only with dampening, which spares a first step."""

    function = "sgd_rows_"
    reset = reference = ("momentum_buffer",)

    def leaves_to_torch(self, group: Group, p: Parameter, owned: OwnedParameter) -> bool:
        return super().leaves_to_torch(group, p, owned) and not self._starts_late(group, p)

    def _starts_late(self, group: Group, p: Parameter) -> bool:
        """torch's fused kernel takes momentum buffers for all of its parameters or for none."""
        state = self._optimizer.state
        return (
            group["fused"]
            and group["momentum"]
            and "momentum_buffer" not in state.get(p, {})
            and any("momentum_buffer" in state.get(other, {}) for other in group["params"])
        )

    def flags(self, group: Group) -> Flags:
        numbers = {key: float(group[key]) for key in ("lr", "momentum", "dampening")}
        numbers["weight_decay"] = float(group["weight_decay"])
        return {**numbers, "nesterov": group["nesterov"], "maximize": group["maximize"]}

    def is_stateful(self, group: Group) -> bool:
        return bool(group["momentum"])

    def counts(self, group: Group) -> bool:
        return bool(group["momentum"] and group["dampening"])

    def prepare(self, group: Group, p: Parameter, owned: OwnedParameter, state: State) -> None:
        had_buffer = isinstance(state.get("momentum_buffer"), Tensor)
        if not had_buffer:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if group["dampening"] and COUNTS not in state:
            state[COUNTS] = counts_from(had_buffer, len(owned.channels), p.device)

    def row_state(self, group: Group, state: State) -> tuple[Tensor | None, ...]:
        return state["momentum_buffer"] if group["momentum"] else None, state.get(COUNTS)


class AdamRows(RowSteps):
    """``torch.optim.Adam`` and ``AdamW``, with one step count per neuron."""

    function = "adam_rows_"
    reset = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    reference = ("exp_avg",)

    def flags(self, group: Group) -> Flags:
        beta1, beta2 = map(float, group["betas"])
        numbers = {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
        return {
            **numbers,
            "beta1": beta1,
            "beta2": beta2,
            "decoupled": group["decoupled_weight_decay"],
            "maximize": group["maximize"],
        }

    def is_stateful(self, group: Group) -> bool:
        return True

    def counts(self, group: Group) -> bool:
        return True

    def prepare(self, group: Group, p: Parameter, owned: OwnedParameter, state: State) -> None:
        if not state:
            is_double = torch.get_default_dtype() == torch.float64 and not group["fused"]
            state["step"] = torch.zeros(
                (),
                dtype=torch.float64 if is_double else torch.float32,
                device=p.device if group["fused"] else "cpu",
            )
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if COUNTS not in state:
            state[COUNTS] = counts_from(state["step"], len(owned.channels), p.device)

    def row_state(self, group: Group, state: State) -> tuple[Tensor | None, ...]:
        largest = state["max_exp_avg_sq"] if group["amsgrad"] else None
        return state["exp_avg"], state["exp_avg_sq"], largest, state[COUNTS]

    def decay(self, flags: Flags, p: Parameter, owned: OwnedParameter, state: State) -> None:
        here = owned.rows_here(p)
        v = local(state["exp_avg_sq"])
        reference.decay_frozen_(v, here.order, here.n, here.layout, flags["beta2"])


ROW_STEPS: dict[type[Optimizer], type[RowSteps]] = {
    SGD: SGDRows,
    Adam: AdamRows,
    AdamW: AdamRows,
}


def group_refusal(group: Group) -> str | None:
    """Why parameters of this group take the guard, or None."""
    if group["differentiable"]:
        return "differentiable=True: the step itself is differentiated by torch"
    if group.get("capturable"):
        return "capturable=True: row steps read the number of active neurons on the host"
    return None


def parameter_refusal(p: Parameter) -> str | None:
    """Why this parameter takes the guard, or None."""
    if not p.is_floating_point():
        return f"row steps support real floating-point parameters, got {p.dtype}"
    if type(p) is not Parameter and not is_distributed(p):
        return f"row steps support plain parameters, got {type(p).__name__}"
    if p.grad is None:
        return None
    if p.grad.layout != torch.strided:
        return f"row steps support dense gradients, got {p.grad.layout}"
    if p.grad.dtype != p.dtype:
        return f"row steps support gradients of the parameter's dtype, got {p.grad.dtype}"
    return None


def _backend(tensors: list[Tensor], layout: NeuronLayout) -> Backend | None:
    """The backend in use for the device if it can step these; None: plain torch does."""
    first = tensors[0]
    if not all(
        t.device == first.device and t.dtype == first.dtype and _lie_alike(t, first)
        for t in tensors
    ):
        return None
    backend = selector.backends[selector.backends_for(first.device.type)[0]]
    return backend if backend.supports_row_steps(first, layout) else None


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements at the same places in memory."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)
