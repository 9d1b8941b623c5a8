"""Everything that must hold of one model, seen from outside: one row."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

import neq_kernels as neq
from benchmarks.zoo.comparison import (
    FLOAT32,
    FLOAT64,
    Example,
    freeze_half,
    gradient_faults,
    same,
    seed,
    weighted_sum,
)
from benchmarks.zoo.products import Products
from neq_kernels.channels import ActiveChannels
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners

CHECKS = ("forward", "gradients", "frozen", "sgd", "adamw", "revert", "stop")
# Above it the parameters, gradients and both optimizers' states are kept in float32.
MOST_IN_FLOAT64 = 20_000_000
_NOISE = 0.02
# Of the MACs in neurons: below it, a row says what is left out.
_SAY_WHAT_IS_OUTSIDE = 0.95
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def check(build: Callable[[], Example]) -> dict[str, Any]:
    """One row: parameters, each of :data:`CHECKS` (True, False, or None where it could not be
    asked), the share of MACs in neurons, and in ``reason`` what is wrong, in words."""
    warnings.simplefilter("ignore")
    seed()
    row: dict[str, Any] = {}
    try:
        example = build()
        row["parameters"] = sum(p.numel() for p in example.model.parameters())
        outputs, dtype = None, "float64"
        if row["parameters"] <= MOST_IN_FLOAT64:
            double = example.in_dtype(torch.float64)
            outputs = _first_outputs(double, refused=(RuntimeError, ValueError, TypeError))
            example = build() if outputs is None else double
        if outputs is None:
            outputs, dtype = _first_outputs(example, refused=()), "float32"
    except Exception as error:
        return row | {"built": False, "reason": f"not built: {_words(error)}"}
    assert outputs is not None
    return row | {"built": True, "dtype": dtype} | _Checked(example, outputs, dtype).row()


def _first_outputs(
    example: Example, *, refused: tuple[type[Exception], ...]
) -> list[Tensor] | None:
    """Of one forward and backward; None if the model refuses. Constant weights get noise before: a
    zero would hide every gradient below it."""
    with torch.no_grad():
        for parameter in example.model.parameters():
            is_constant = parameter.numel() > 1 and bool(parameter.min() == parameter.max())
            if is_constant and parameter.is_floating_point():
                parameter.add_(_NOISE * torch.randn_like(parameter))
    try:
        outputs = example.forward(example.model)
        weighted_sum(outputs).backward()
    except refused:
        return None
    example.model.zero_grad(set_to_none=True)
    return outputs


class _Checked:
    """The checks, one after the other; ``cells`` and ``reasons`` grow."""

    def __init__(self, example: Example, outputs: list[Tensor], dtype: str) -> None:
        self.example, self.dense, self.outputs = example, example.model, outputs
        self.tolerance = FLOAT64 if dtype == "float64" else FLOAT32
        self.cells: dict[str, Any] = dict.fromkeys(CHECKS)
        self.reasons: list[str] = []

    def row(self) -> dict[str, Any]:
        if not all(bool(t.isfinite().all()) for t in self.outputs if t.is_floating_point()):
            return {"reason": "not checked: its outputs are not finite"}
        again = self.example.forward(self.dense)
        if not same(self.outputs, again):
            return {"reason": "not checked: two forwards with one seed differ by themselves"}
        self.outputs = again
        del again
        with self._cell("forward"):
            count = self._dense_backward()
            if count is None:
                return {"reason": "not checked: its gradients are not finite"}
            types = _classes(self.dense)
            hooks = _hooks(self.dense)
            model = self._converted()
            if model is None:
                return {"mac_share": 0.0, "reason": "no layer of it can be converted"}
            self._check("forward", same(self.outputs, self.example.forward(model)), "differs")
            self._note_share(count, _owned_shares(model))
            self._half_frozen(model)
            self._revert(model, types, hooks)
            self._stop(model, count)
        return self.cells | {"reason": "; ".join(self.reasons)}

    def _note_share(self, count: Products, owned: Mapping[str, float]) -> None:
        self.cells["mac_share"] = share = count.share_of(owned)
        outside = count.largest_outside(owned) if share < _SAY_WHAT_IS_OUTSIDE else None
        if outside is not None:
            self.reasons.append(f"MACs outside: {outside[0]} has most, {outside[1]:.0%} of all")

    def _converted(self) -> nn.Module | None:
        model = _copy(self.dense)
        try:
            return neq.convert(model)
        except ValueError as error:
            if "expected at least one layer that can be converted" in str(error):
                return None
            raise

    def _dense_backward(self) -> Products | None:
        with Products(self.dense, (self.example.args, self.example.kwargs)) as count:
            loss = weighted_sum(self.example.forward(self.dense))
            count.in_backward = True
            loss.backward()
        gradients = (p.grad for p in self.dense.parameters() if p.grad is not None)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return None
        if count.computes_in_float32:
            self.tolerance = FLOAT32
        return count

    def _half_frozen(self, model: nn.Module) -> None:
        frozen = freeze_half(model)
        with self._cell("gradients"):
            outputs = self.example.forward(model)
            self._check("forward", same(self.outputs, outputs), "differs with frozen neurons")
            weighted_sum(outputs).backward()
            del outputs
            self._compare_gradients(model, frozen)
            self.dense.zero_grad(set_to_none=True)
            self._step("sgd", torch.optim.SGD, SGD, model, frozen)
            self._step("adamw", torch.optim.AdamW, ADAMW, model, frozen)
        model.zero_grad(set_to_none=True)

    def _compare_gradients(self, model: nn.Module, frozen: Mapping[Parameter, Tensor]) -> None:
        self.cells["gradients"] = self.cells["frozen"] = True
        for cell, names in gradient_faults(self.dense, model, frozen, self.tolerance).items():
            self._check(cell, False, f"{len(names)} parameters, {', '.join(names[:3])}")

    def _step(
        self,
        cell: str,
        kind: Callable[..., Optimizer],
        options: Mapping[str, float],
        model: nn.Module,
        frozen: Mapping[Parameter, Tensor],
    ) -> None:
        """From equal weights with equal gradients, so that only the step is compared."""
        with self._cell(cell):
            owners = neuron_owners(model)
            pairs = list(zip(self.dense.parameters(), model.parameters(), strict=True))
            optimizer = kind([ours for _, ours in pairs], **options)
            handle = neq.attach(optimizer, model)
            optimizer.step()
            moved = [
                ours
                for theirs, ours in pairs
                if ours in frozen
                and not torch.equal(
                    owners[ours][0][1].gather(ours.detach(), frozen[ours]),
                    owners[ours][0][1].gather(theirs.detach(), frozen[ours]),
                )
            ]
            for theirs, ours in pairs:
                theirs.grad = ours.grad
            kind([theirs for theirs, _ in pairs], **options).step()
            off = []
            for theirs, ours in pairs:
                keep = torch.ones_like(ours, dtype=torch.bool)
                if ours in frozen:
                    owners[ours][0][1].fill_(keep, frozen[ours], False)
                scale = theirs.detach().abs().clamp_min(options["lr"])
                error = ((ours.detach() - theirs.detach()).abs() / scale)[keep]
                if error.numel() and not float(error.max()) <= self.tolerance.step:
                    off.append(ours)
                theirs.grad = None
                theirs.data.copy_(ours.data)
            names = {p: name for name, p in model.named_parameters()}
            self._check(cell, not moved, f"frozen rows moved: {[names[p] for p in moved[:3]]}")
            self._check(cell, not off, f"active rows differ: {[names[p] for p in off[:3]]}")
            handle.remove()

    def _revert(self, model: nn.Module, types: list[list[str]], hooks: int) -> None:
        with self._cell("revert"):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            neq.revert(model)
            after = model.state_dict()
            equal = list(before) == list(after) and all(
                torch.equal(before[name], after[name]) for name in before
            )
            back = _classes(model) == types
            self._check("revert", equal, "state_dict differs")
            self._check("revert", back, "classes differ")
            self._check("revert", _hooks(model) == hooks, "hooks are left")
            outputs = self.example.forward(self.dense)
            self._check("revert", same(outputs, self.example.forward(model)), "forward differs")

    def _stop(self, model: nn.Module, count: Products) -> None:
        """Freeze the first half of the neuron layers; count what backprop still computes."""
        with self._cell("stop"):
            neq.convert(model, others="follow")
            bottom, live = _halves(model, count.first_use)
            if not bottom:
                self.reasons.append("stop: fewer than two neuron layers")
                return
            boundary = min((count.first_use[name] for name in live), default=0)
            for channels in bottom:
                channels.set([])
            with torch.no_grad():
                self.example.forward(model)  # the first forward shows who follows
            ours = self._input_gradient_macs(model)
            frozen = {
                name
                for name, parameter in model.named_parameters()
                if count.first_use.get(name, 0) < boundary
                or any(p is parameter for p in _stopped(model))
            }
            for name, parameter in self.dense.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name not in frozen)
            needed = self._input_gradient_macs(self.dense)
            dense = count.input_gradient_macs
            self.cells["dgrad"] = ours / dense if dense else 0.0
            self.cells["dgrad_needed"] = needed / dense if dense else 0.0
            words = f"{self.cells['dgrad']:.0%} of the input gradients are computed, "
            words += f"{self.cells['dgrad_needed']:.0%} needed"
            self._check("stop", ours <= needed, words)

    def _input_gradient_macs(self, model: nn.Module) -> int:
        with Products(model, (self.example.args, self.example.kwargs)) as count:
            loss = weighted_sum(self.example.forward(model))
            count.in_backward = True
            loss.backward()
        return count.input_gradient_macs

    def _check(self, cell: str, holds: bool, words: str) -> None:
        if not holds:
            self.reasons.append(f"{cell}: {words}")
        self.cells[cell] = bool(self.cells[cell] is not False and holds)

    @contextmanager
    def _cell(self, cell: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._check(cell, False, _words(error))


def _halves(
    model: nn.Module, first_use: Mapping[str, int]
) -> tuple[list[ActiveChannels], list[str]]:
    """The active sets of the first half of the neuron layers, in the order in which the forward
    reads them (what it never reads comes first), and the names of the parameters that only other
    layers own."""
    names = {p: name for name, p in model.named_parameters()}
    owners = neuron_owners(model)
    layers = []
    for _, layer in named_neuron_layers(model):
        own = [p for p, _ in layer.neuron_parameters()]
        layers.append((min(first_use.get(names[p], -1) for p in own), own))
    layers.sort(key=lambda each: each[0])
    bottom = {c for _, own in layers[: len(layers) // 2] for p in own for c, _ in owners[p]}
    live = {
        names[p]
        for _, own in layers[len(layers) // 2 :]
        for p in own
        if names[p] in first_use and not any(c in bottom for c, _ in owners[p])
    }
    return list(bottom), list(live)


def _copy(model: nn.Module) -> nn.Module:
    """Of a model that has run, too: some keep what they computed, which cannot be copied."""
    for module in model.modules():
        for name, value in module.__dict__.items():
            kept = [] if name.startswith("_") else tree_leaves(value)
            if any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in kept):
                setattr(module, name, tree_map_only(Tensor, Tensor.detach, value))
    return copy.deepcopy(model)


def _stopped(model: nn.Module) -> list[Parameter]:
    return [p for p, known in neuron_owners(model).items() if all(c.none_active for c, _ in known)]


def _owned_shares(model: nn.Module) -> dict[str, float]:
    owners = neuron_owners(model)
    return {name: float(p in owners) for name, p in model.named_parameters()}


def _classes(model: nn.Module) -> list[list[str]]:
    """By name, with their bases: a parametrization makes a class anew for every layer."""
    return [
        [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
        for module in model.modules()
    ]


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _words(error: BaseException) -> str:
    """In one line, with the last place in the library that it came through."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/neq_kernels/" in f.filename]
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}{place}"
