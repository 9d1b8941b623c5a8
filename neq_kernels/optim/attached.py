"""A torch optimizer that leaves frozen neurons alone."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.optim import step_check
from neq_kernels.optim.agreement import Agreement
from neq_kernels.optim.dense_serving import DenseServing
from neq_kernels.optim.guard import Guard
from neq_kernels.optim.invalidation import Watch
from neq_kernels.optim.ownership import OwnedParameter, Ownership
from neq_kernels.optim.row_steps import (
    ROW_STEPS,
    FrozenState,
    Group,
    GroupPlan,
    RowSteps,
    group_refusal,
    parameter_refusal,
)
from neq_kernels.optim.step_counts import State, drop_counts, restore_counts
from neq_kernels.sharding import local

logger = logging.getLogger(__name__)


# Of our hooks in the optimizer's dicts; torch's own keys are numbers.
_KEY = "neq_kernels"


def is_attached_optimizer(optimizer: Optimizer) -> bool:
    """Whether :func:`attach` has been called for ``optimizer``."""
    hooks: dict[Any, Any] = optimizer._optimizer_step_pre_hooks
    return _KEY in hooks


class ParameterUpdate(NamedTuple):
    """How one parameter of an attached optimizer is updated.

    Attributes:
        name: its name in the model, or its position in the optimizer if it is not the model's.
        update: ``"rows"`` (only active neurons are stepped), ``"guard"`` (everything is stepped,
            frozen neurons are put back) or ``"torch"`` (no neuron owns it).
        reason: why not ``"rows"``; empty for ``"rows"``.
    """

    name: str
    update: Literal["rows", "guard", "torch"]
    reason: str


@dataclass
class _StepPlan:
    """Who steps which parameter, and how, until ``watch`` sees a change.

    Attributes:
        left: the parameters torch steps, group by group.
        guarded: those of them the guard holds.
        by_rows: the parameters with row steps, of the groups that have any.
        groups: their row steps; None before the first step.
        watch: None before the first step.
    """

    left: list[list[Parameter]] = field(default_factory=list)
    guarded: dict[Parameter, OwnedParameter] = field(default_factory=dict)
    by_rows: list[tuple[Group, dict[Parameter, OwnedParameter]]] = field(default_factory=list)
    groups: list[GroupPlan] | None = None
    watch: Watch | None = None


class AttachedOptimizer:
    """What :func:`attach` returns: how each parameter is updated, and the way back."""

    def __init__(
        self,
        optimizer: Optimizer,
        ownership: Ownership,
        frozen_state: FrozenState,
        free_frozen_state: bool,
    ) -> None:
        self._optimizer = optimizer
        self._ownership = ownership
        self._options = (frozen_state, free_frozen_state)
        is_checked = step_check.is_asked_for()
        self._guard = Guard(optimizer)
        self._agreement = Agreement()
        self._logged: set[str] = set()
        row_steps = ROW_STEPS.get(type(optimizer))
        self._rows: RowSteps | None = None
        if row_steps is not None:
            self._rows = row_steps(optimizer, frozen_state, free_frozen_state)
        self._plan: _StepPlan | None = None
        self._expects_load = False
        restore_counts(optimizer, ownership.parameters)
        self._dense_serving = DenseServing(ownership)
        self._check = step_check.StepCheck(ownership, self._dense_serving) if is_checked else None
        self._register()
        # A step compiled by the user breaks its graph here: what is active is decided on the host.
        eager: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable
        self._step_first = eager(self._run_closure_and_rows)
        for name, hook in self._hooks().items():
            getattr(optimizer, name)[_KEY] = eager(hook)
        # The user's own post-hooks must see the frozen neurons where they belong.
        optimizer._optimizer_step_post_hooks.move_to_end(_KEY, last=False)  # type: ignore[attr-defined]
        optimizer.__dict__["__getstate__"] = self._state_with_hooks
        for group, p in self._parameters():
            if p in ownership.parameters and (reason := self._refusal(group, p)):
                self._log_once(ownership.parameters[p], reason)

    def __getstate__(self) -> dict[str, Any]:
        return {"_again": (self._optimizer, self._ownership.model, *self._options)}

    def __getattr__(self, name: str) -> Any:
        """A copy attaches itself when it is first used: by then optimizer and model are whole."""
        if name.startswith("__") or "_again" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        optimizer, model, *options = self.__dict__.pop("_again")
        AttachedOptimizer.__init__(self, optimizer, Ownership(model), *options)
        return getattr(self, name)

    def _hooks(self) -> dict[str, Callable[..., Any]]:
        return {
            "_optimizer_step_pre_hooks": self._before_step,
            "_optimizer_step_post_hooks": self._after_step,
            "_optimizer_state_dict_post_hooks": self._after_state_dict,
            "_optimizer_load_state_dict_post_hooks": self._after_load,
        }

    def _state_with_hooks(self) -> dict[str, Any]:
        """What copies and pickles of the optimizer are made from. Torch leaves all hooks out: ours
        go along, and with them the model."""
        optimizer = self._optimizer
        hooks = {name: OrderedDict({_KEY: hook}) for name, hook in self._hooks().items()}
        return {
            **type(optimizer).__getstate__(optimizer),
            **hooks,
            "__getstate__": self._state_with_hooks,
        }

    def report(self) -> list[ParameterUpdate]:
        """How each parameter of the optimizer is updated now, in the optimizer's order."""
        self._refresh()
        names = self._ownership.names()
        updates = []
        for i, (group, p) in enumerate(self._parameters()):
            name = names.get(p, f"optimizer parameter {i}")
            if p not in self._ownership.parameters:
                updates.append(ParameterUpdate(name, "torch", "no neuron owns it"))
            elif reason := self._refusal(group, p):
                updates.append(ParameterUpdate(name, "guard", reason))
            else:
                updates.append(ParameterUpdate(name, "rows", ""))
        return updates

    @property
    def freed_state_bytes(self) -> int:
        """With ``free_frozen_state``: what the state of the wholly frozen parameters took in this
        process, before it was freed."""
        return 0 if self._rows is None else self._rows.freed_bytes()

    def remove(self) -> None:
        """Give the optimizer back to torch: from the next step on every neuron is updated."""
        if not is_attached_optimizer(self._optimizer):
            return
        for name in self._hooks():
            del getattr(self._optimizer, name)[_KEY]
        del self._optimizer.__dict__["__getstate__"]
        for anchor in self._ownership.anchors:
            anchor.optimizers.discard(self)
        if self._check is not None:
            self._check.stop()
        self._dense_serving.stop()
        drop_counts(self._optimizer, self._ownership.parameters)

    def stand_in(self, frozen: Collection[Parameter]) -> Parameter | None:
        """The smallest parameter, where nothing that the optimizer holds learns; None otherwise,
        and for all wholly frozen layers but that of the first neurons it holds."""
        owned = self._ownership.parameters
        held = [p for _, p in self._parameters()]
        first = next((p for p in held if p in owned), None)
        if not any(p is first for p in frozen):
            return None
        self._ownership.update_active_sets()
        learning = [p for p in held if p.requires_grad]
        if any(p not in owned or owned[p].channels.n_active for p in learning):
            return None
        return min(learning, key=Tensor.numel, default=None)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._refuse_capture()
        self._agreement.count(self._ownership.layers())
        if self._rows is None:
            self._refresh()
            self._guard.save(self._owned())
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        rest: Any = object.__new__(type(optimizer))
        rest.__dict__.update(optimizer.__dict__)
        # Torch steps the rest: a stand-in that shares everything but the parameter lists, so the
        # gradients of neuron-owned parameters stay where they are whatever happens. The closure is
        # the first thing a step runs, after all pre-hooks and before all post-hooks.
        return (rest, functools.partial(self._step_first, rest, closure)), {}

    def _run_closure_and_rows(self, rest: Any, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            rest.param_groups = self._step_rows()
        return loss

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._guard.restore()
        if self._check is not None:
            self._check.step_ended()

    def _after_state_dict(self, optimizer: Optimizer, state_dict: State) -> State:
        if self._rows is None:
            return state_dict
        self._ownership.update_active_sets()
        saved = dict(state_dict["state"])
        for i, (group, p) in enumerate(self._parameters()):
            owned = self._ownership.parameters.get(p)
            if owned is not None and not self._refusal(group, p):
                state = self._rows.saved_state(group, p, owned)
                if state:
                    saved[i] = state
        return {**state_dict, "state": saved}

    def _after_load(self, optimizer: Optimizer) -> None:
        self._refresh()
        restore_counts(optimizer, self._ownership.parameters)
        self._plan = None
        self._expects_load = False
        if self._rows is not None:
            self._rows.forget()

    def _step_rows(self) -> list[Group]:
        """Step the neuron-owned parameters; the groups that are left for torch."""
        assert self._rows is not None
        self._refresh()
        if self._expects_load:  # and got none
            some = self._owned()
            drop_counts(self._optimizer, [p for p in some if some[p].all_active])
        self._expects_load = self._only_makes_state()
        if self._expects_load:
            self._rows.make_all_state(self._ownership.parameters)
        plan, self._plan = self._plan, None
        if plan is None or plan.watch is None or not plan.watch.sees_no_change():
            plan = self._assign(self._rows)
        if plan.by_rows and not self._overflowed():
            for _, own in plan.by_rows:
                self._unscale(own)
            if plan.groups is None:
                plan.groups = [self._rows.plan(group, own) for group, own in plan.by_rows]
            for group_plan in plan.groups:
                self._rows.step(group_plan)
        drop_counts(self._optimizer, plan.guarded)
        self._guard.save(plan.guarded)
        if plan.groups is not None or not plan.by_rows:
            if plan.watch is None:
                watched = [p for _, own in plan.by_rows for p in own]
                plan.watch = Watch(self._optimizer, self._ownership, [*watched, *plan.guarded])
            self._plan = plan
        groups = self._optimizer.param_groups
        return [{**g, "params": rest} for g, rest in zip(groups, plan.left, strict=True)]

    def _assign(self, row_steps: RowSteps) -> _StepPlan:
        """Who steps which parameter."""
        plan = _StepPlan()
        for group in self._optimizer.param_groups:
            own, rest = {}, []
            for p in group["params"]:
                owned = self._ownership.parameters.get(p)
                if owned is None or row_steps.leaves_to_torch(group, p, owned):
                    rest.append(p)
                elif reason := self._refusal(group, p):
                    self._log_once(owned, reason)
                    plan.guarded[p] = owned
                    rest.append(p)
                else:
                    own[p] = owned
            if own:
                plan.by_rows.append((group, own))
            plan.left.append(rest)
        return plan

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint has state made that it can
        load into: an optimizer's first, with no learning rate and gradients of zeros."""
        if self._optimizer.state:
            return False
        groups = self._optimizer.param_groups
        return all(float(group.get("lr", 1)) == 0 for group in groups) and all(
            p.grad is not None and not bool(p.grad.any())
            for _, p in self._parameters()
            if p.requires_grad
        )

    def _overflowed(self) -> bool:
        """What a GradScaler tells optimizers with fused kernels."""
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _unscale(self, parameters: Iterable[Parameter]) -> None:
        """As torch's fused kernels: the gradient itself is divided by the scaler's factor."""
        scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        if scale is not None:
            for p in parameters:
                if p.grad is not None:
                    local(p.grad).div_(scale.to(p.grad.device))

    def _refresh(self) -> None:
        released = self._ownership.refresh(self._optimizer)
        if self._ownership.anchors is not self._anchors and is_attached_optimizer(self._optimizer):
            self._register()
        drop_counts(self._optimizer, released)

    def _register(self) -> None:
        self._anchors = self._ownership.anchors
        for anchor in self._anchors:
            anchor.optimizers.add(self)

    def _parameters(self) -> Iterator[tuple[Group, Parameter]]:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                yield group, p

    def _owned(self) -> dict[Parameter, OwnedParameter]:
        owned = self._ownership.parameters
        return {p: owned[p] for _, p in self._parameters() if p in owned}

    def _refusal(self, group: Group, p: Parameter) -> str | None:
        if self._rows is None:
            return f"{type(self._optimizer).__name__} has no row steps (SGD, Adam and AdamW have)"
        owned = self._ownership.parameters[p]
        return group_refusal(group) or parameter_refusal(p) or owned.row_refusal(p)

    def _log_once(self, owned: OwnedParameter, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("%s (and maybe others) takes the guard: %s", owned.name, reason)

    def _refuse_capture(self) -> None:
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return
        if any(p.is_cuda for p in self._ownership.parameters):
            raise RuntimeError(
                "optimizer.step cannot be captured in a CUDA graph once attached: the set of "
                "active neurons would be baked into the graph"
            )
