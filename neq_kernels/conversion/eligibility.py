"""Decide which modules can be converted, to what, and why not."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from neq_kernels.channels import NeuronLayout
from neq_kernels.conversion.neuron_classes import known_base, neuron_class, redefined
from neq_kernels.conversion.third_party.peft import adapted
from neq_kernels.conversion.weight_readers import checkpoints_inside
from neq_kernels.layers.base import NeuronLayer, unparametrized
from neq_kernels.layers.masked import Masked
from neq_kernels.layers.replaced_forward import replaced_forward

Filter = Callable[[str, nn.Module], bool]


def reasons_against(model: nn.Module, filter: Filter | None, norms: bool) -> dict[str, str | None]:
    """For each module, why it is not converted; None if it can be."""
    inside_adapters = adapted(model)
    reasons = {
        name: "the base layer of an adapter (peft)"
        if module in inside_adapters and not isinstance(module, NeuronLayer)
        else _own_reason(name, module, filter, norms)
        for name, module in model.named_modules()
    }
    candidates = {
        id(m) for n, m in model.named_modules() if reasons[n] is None or isinstance(m, NeuronLayer)
    }
    elsewhere = {
        id(p): name
        for name, module in model.named_modules()
        if id(module) not in candidates and not isinstance(module, parametrize.ParametrizationList)
        for p in module.parameters(recurse=False)
    }
    neurons: dict[int, set[NeuronLayout]] = {}
    for module in model.modules():
        if id(module) in candidates:
            for parameter, layout in layouts(module):
                neurons.setdefault(id(parameter), set()).add(layout)
    for name, module in model.named_modules():
        if reasons[name] is not None or isinstance(module, NeuronLayer):
            continue
        for parameter, _ in layouts(module):
            if id(parameter) in elsewhere:
                holder = elsewhere[id(parameter)] or "the model"
                named = {id(p): n for n, p in module.named_parameters(recurse=False)}
                reasons[name] = f"its {named.get(id(parameter), 'weight')} is shared with {holder}"
            elif len(neurons[id(parameter)]) > 1:
                reasons[name] = "its weight is shared with a layer that sees other neurons in it"
    return reasons


def layouts(module: nn.Module) -> list[tuple[nn.Parameter, NeuronLayout]]:
    """The parameters that neurons of a layer own, converted or not yet, and where a neuron lies."""
    if isinstance(module, NeuronLayer):
        return module.neuron_parameters()
    ours = neuron_class(unparametrized(module))
    assert ours is not None
    return [*ours.parameters_in(module)[:1], *ours.further_parameters_in(module)]


def _taken(module: nn.Module, ours: type[NeuronLayer]) -> list[str]:
    """Attributes of the layer itself that a neuron layer has another use for."""
    lineage = [c for c in ours.__mro__ if issubclass(c, NeuronLayer)]
    names = {name for c in lineage for name in vars(c) if not name.startswith("__")}
    names = names - {"forward", "qconfig"} | {"channels", "grad_input", "anchor"}
    return sorted(names & vars(module).keys())


_RECURRENT = (
    "recurrent: each weight serves every time step, and learns as a whole; it keeps backprop alive "
    "to where the layer sits, unless others='follow' stops it with what lies below"
)


def _own_reason(name: str, module: nn.Module, filter: Filter | None, norms: bool) -> str | None:
    if isinstance(module, NeuronLayer):
        return None
    kind = unparametrized(module)
    ours = neuron_class(kind)
    if ours is None:
        base, _ = known_base(kind)
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return _RECURRENT
        if isinstance(module, nn.EmbeddingBag):
            return "it adds up its rows in one operator, whose gradient is dense; see nn.Embedding"
        if base is None:
            return "not a supported layer type"
        names = ", ".join(redefined(kind, base))
        return f"a subclass of {base.__name__} with its own {names}; see neq.register"
    if replaced_forward(module):
        return "its forward was replaced on the layer itself, before convert"
    if parametrize.is_parametrized(module) and issubclass(ours, Masked):
        return "parametrized"
    if issubclass(ours, Masked) and checkpoints_inside(kind):
        return "its forward has a checkpoint inside, whose recomputation would not hold neurons"
    taken = _taken(module, ours)
    if taken:
        return f"it has an attribute of its own that neurons would take: {', '.join(taken)}"
    unsupported = ours.reason_against(module)
    if unsupported is not None:
        return unsupported
    if ours.is_norm and not norms:
        return "norms=False"
    if filter is not None and not filter(name, module):
        return "left out by filter"
    return None
