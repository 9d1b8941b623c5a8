"""The conversion report: every module and parameter, converted or not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from neq_kernels.conversion.eligibility import reasons_against
from neq_kernels.layers import traversal
from neq_kernels.layers.base import NeuronLayer, stock_class
from neq_kernels.layers.following import followers
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
    reasons = reasons_against(inner, None, norms=True)
    modules = []
    for name, module in inner.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        converted = isinstance(module, NeuronLayer)
        kind = stock_class(type(module)).__name__
        reason = "" if converted else reasons[name] or "convert was not called, or left it out"
        modules.append(ReportEntry(name, kind, converted, reason))
    owners = traversal.neuron_owners(inner)
    following = {id(follower.parameter) for follower in followers(inner)}
    others = tuple(
        ReportEntry(name, "parameter", False, _other_reason(id(parameter) in following))
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and (parameter not in owners or id(parameter) in following)
    )
    return ConversionReport(tuple(modules), others)


def _other_reason(follows: bool) -> str:
    if follows:
        return "owned by no neuron: stops with what lies below it, or with its block"
    return "owned by no neuron: always active, keeps backprop alive to where it sits"
