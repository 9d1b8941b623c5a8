"""The conversion report: every module and parameter, converted or not, and why."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from neq_kernels.conversion.eligibility import Filter, reasons_against
from neq_kernels.layers import traversal
from neq_kernels.layers.base import NeuronLayer, stock_class
from neq_kernels.layers.following import followers
from neq_kernels.layers.masked import FurtherNeurons
from neq_kernels.layers.replaced_forward import calls_its_class
from neq_kernels.layers.traversal import unwrap


@dataclass(frozen=True)
class ReportEntry:
    """One module or parameter of a :class:`ConversionReport`; ``reason`` is empty if converted."""

    name: str
    kind: str
    converted: bool
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did, or would do, with every module that holds parameters.

    Attributes:
        modules: each module that holds parameters itself, converted or not, and why not.
        others: each parameter that no neuron owns. It keeps backprop alive to where it sits.
    """

    modules: tuple[ReportEntry, ...]
    others: tuple[ReportEntry, ...]

    def __str__(self) -> str:
        rows = [
            (e.name, e.kind, "converted" if e.converted else f"not converted: {e.reason}")
            for e in self.modules
        ]
        rows += [(e.name, "parameter", e.reason) for e in self.others]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{n:<{widths[0]}}  {k:<{widths[1]}}  {text}" for n, k, text in rows)


def conversion_report(model: nn.Module) -> ConversionReport:
    """List every module and parameter: converted or not, and why."""
    inner = unwrap(model)
    owners = traversal.neuron_owners(inner, following=False)  # first: it may take neurons away
    reasons = reasons_against(inner, None, norms=True)
    modules = []
    for name, module in inner.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, FurtherNeurons) or not (own or isinstance(module, NeuronLayer)):
            continue
        if isinstance(module, parametrize.ParametrizationList) and all(p in owners for p in own):
            continue  # they are those of the layer around it
        converted = isinstance(module, NeuronLayer) and calls_its_class(module)
        kind = stock_class(type(module)).__name__
        reason = "" if converted else reasons[name] or "convert was not called, or left it out"
        if isinstance(module, NeuronLayer) and not converted:
            reason = "its forward was replaced after convert, by one that does not call it"
        modules.append(ReportEntry(name, kind, converted, reason))
    following = {follower.parameter for follower in followers(inner)}
    others = tuple(
        ReportEntry(name, "parameter", False, _other_reason(parameter in following))
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and parameter not in owners
    )
    return ConversionReport(tuple(modules), others)


def warn_of_little(model: nn.Module, filter: Filter | None, norms: bool) -> None:
    """Warn if less than half of what learns in matrices has neurons, though all of it may have."""
    owners = traversal.neuron_owners(model, following=False)
    learning = (p for p in model.parameters() if p.requires_grad and not is_lazy(p))
    matrices = {p for p in learning if p.dim() > 1}
    total = sum(p.numel() for p in matrices)
    left = total - sum(p.numel() for p in matrices.intersection(owners))
    if filter is not None or 2 * left <= total:
        return
    reasons = reasons_against(model, None, norms)
    costs: Counter[str] = Counter()
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter in matrices and parameter not in owners:
                costs[f"{type(module).__name__} ({reasons[name] or 'a parameter of its own'})"] += (
                    parameter.numel()
                )
    shares = (f"{kind} {size / total:.0%}" for kind, size in costs.most_common(3))
    warnings.warn(
        f"convert: only {1 - left / total:.0%} of the elements of matrices have neurons; the rest "
        f"learns on, whatever is frozen: {', '.join(shares)}; see neq.conversion_report(model), "
        "and neq.register for layers of your own",
        stacklevel=3,
    )


def _other_reason(follows: bool) -> str:
    if follows:
        return "owned by no neuron: stops with what lies below it, or with its block"
    return "owned by no neuron: always active, keeps backprop alive to where it sits"
