"""Turning the layers of a model into neuron layers, in place, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from neq_kernels import layers
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.distributed import StoppedParameters
from neq_kernels.functional import GradInput
from neq_kernels.layers import FollowingParameters, NeuronLayer, named_neuron_layers, unwrap

Filter = Callable[[str, nn.Module], bool]

_NEURON_CLASSES: dict[type[nn.Module], type[NeuronLayer]] = {
    nn.Linear: layers.Linear,
    nn.Conv1d: layers.Conv1d,
    nn.Conv2d: layers.Conv2d,
    nn.Conv3d: layers.Conv3d,
    nn.ConvTranspose1d: layers.ConvTranspose1d,
    nn.ConvTranspose2d: layers.ConvTranspose2d,
    nn.ConvTranspose3d: layers.ConvTranspose3d,
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.GroupNorm: layers.GroupNorm,
    nn.LayerNorm: layers.LayerNorm,
}
_STATE = ("channels", "grad_input", "specialized", "stopped")


def convert(
    model: nn.Module,
    *,
    filter: Filter | None = None,
    grad_input: GradInput = "exact",
    norms: bool = True,
    others: Literal["train", "follow"] = "train",
) -> nn.Module:
    """Give the layers of ``model`` neurons that can be frozen.

    The class of each layer of an exact torch.nn type changes in place: the objects, their
    parameters, hooks, ``state_dict`` and every reference to them stay. All channels start active,
    and the model computes what it did. Convert before wrapping in DistributedDataParallel, FSDP or
    ``torch.compile``. Converting again does nothing to what is converted.

    Args:
        model: any module.
        filter: ``filter(name, module) -> bool``, False leaves a layer alone.
        grad_input: ``"exact"``: input gradients are the dense ones. ``"active"``: the approximation
            that only active channels propagate.
        norms: convert norm layers too (their neurons are channel-wise scales and shifts).
        others: parameters no neuron owns (class tokens, layer scales, position tables) ``"train"``
            on, or ``"follow"``: they stop while every neuron of the module that holds them is
            frozen (of its nearest ancestor with neurons, if it has none; for the outermost module
            its last neuron layer, the output, does not count). Parameters of whole unconverted
            layers, such as embeddings, follow their nearest ancestor likewise.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown option, or no layer can be converted; the message says why not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if grad_input not in ("exact", "active"):
        raise ValueError(f"grad_input: expected 'exact' or 'active', got {grad_input!r}")
    if others not in ("train", "follow"):
        raise ValueError(f"others: expected 'train' or 'follow', got {others!r}")
    inner = unwrap(model)
    known = [layer for _, layer in named_neuron_layers(inner)]
    stopped = known[0].stopped if known else StoppedParameters()
    shared = {layer.weight: layer.channels for layer in known}
    reasons = _reasons(inner, filter, norms)
    for block, block_class in _replaced_blocks(inner):
        _become(block, block_class)
    for name, layer in inner.named_modules():
        if isinstance(layer, NeuronLayer) or reasons[name] is not None:
            continue
        _become(layer, _NEURON_CLASSES[type(layer)])
        assert isinstance(layer, NeuronLayer)
        n = layer.layout.n_neurons(layer.weight)
        layer.channels = shared.setdefault(layer.weight, ActiveChannels(n))
        layer.channels.prepare(layer.weight.device)
        layer.grad_input, layer.specialized, layer.stopped = grad_input, False, stopped
    if next(named_neuron_layers(inner), None) is None:
        raise ValueError(
            "model: expected at least one layer that can be converted, got none:\n"
            f"{conversion_report(inner)}"
        )
    if others == "follow" and next(layers.following_parameters(inner), None) is None:
        _follow(inner, stopped)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: every layer has its torch.nn class back. Returns ``model``.

    Raises:
        ValueError: a layer's class was changed again since, by a parametrization for example.
    """
    inner = unwrap(model)
    for name, layer in named_neuron_layers(inner):
        if type(layer) not in _NEURON_CLASSES.values():
            raise ValueError(
                f"{name}: expected the class that convert gave it, got {type(layer).__name__}; "
                "remove what was put on top first, such as a parametrization"
            )
    for module in inner.modules():
        if isinstance(module, NeuronLayer):
            for name in _STATE:
                module.__dict__.pop(name, None)
            _become(module, _stock_class(module))
        following = module.__dict__.pop("neq_following", None)
        if following is not None:
            following.remove()
        for stock, replacement in _replacements().items():
            if type(module) is replacement:
                _become(module, stock)
    return model


def specialize(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let ``torch.compile`` recompile when a layer stops or starts again.

    By default one compiled graph serves all masks, so a wholly frozen layer still saves its input,
    keeps backprop alive and gets a gradient of zeros. Specialised, each change of the set of wholly
    frozen layers costs one recompilation and wholly frozen layers cost nothing, as in eager. Raise
    ``torch._dynamo.config.recompile_limit`` to the number of changes you expect. Without effect
    under a process group, where the reducer must see every parameter.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` has no neuron layers.
    """
    for layer in _neuron_layers(model):
        layer.specialized = enabled
    return model


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
    reasons = _reasons(inner, None, norms=True)
    modules = []
    for name, module in inner.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        converted = isinstance(module, NeuronLayer)
        kind = (_stock_class(module) if converted else type(module)).__name__
        reason = "" if converted else reasons[name] or "convert was not called, or left it out"
        modules.append(ReportEntry(name, kind, converted, reason))
    owners = layers.neuron_owners(inner)
    following = {id(p) for f in layers.following_parameters(inner) for p in f.parameters}
    others = tuple(
        ReportEntry(name, "parameter", False, _other_reason(id(parameter) in following))
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad and (parameter not in owners or id(parameter) in following)
    )
    return ConversionReport(tuple(modules), others)


def verify(model: nn.Module, example_input: Any) -> list[str]:
    """Run one backward with half of every layer frozen, and list the parameters whose gradient was
    computed dense all the same: no neuron owns them, or the model uses them without calling their
    layer.

    Args:
        model: a converted model.
        example_input: a tensor, a tuple or list (positional arguments) or a dict (keywords).

    Returns:
        Parameter names. Masks, gradients, buffers, modes and the RNG are left as found.

    Raises:
        ValueError: the model has no neuron layers, or its output needs no gradient.
    """
    inner = unwrap(model)
    owned = {
        id(parameter): (layer.channels, layout)
        for layer in _neuron_layers(inner)
        for parameter, layout in layer.neuron_parameters()
    }
    with _left_as_found(inner):
        for channels in {id(c): c for c, _ in owned.values()}.values():
            channels.set(torch.arange((len(channels) + 1) // 2, device="cpu"))
        _backward_of_everything(inner, example_input)
        dense = []
        for name, parameter in inner.named_parameters():
            if parameter.grad is None:
                continue
            if id(parameter) not in owned:
                dense.append(name)
                continue
            channels, layout = owned[id(parameter)]
            frozen = channels.frozen.to(parameter.device)
            if len(frozen) and bool(layout.gather(parameter.grad, frozen).ne(0).any()):
                dense.append(name)
    return dense


class _left_as_found:
    """Masks, gradients, buffers and RNG of a model, put back on exit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._masks = {layer.channels: layer.channels.mask for layer in _neuron_layers(self._model)}
        self._grads = [(p, p.grad) for p in self._model.parameters()]
        self._buffers = [(b, b.clone()) for b in self._model.buffers()]
        self._rng = torch.random.fork_rng()
        self._rng.__enter__()
        for parameter, _ in self._grads:
            parameter.grad = None

    def __exit__(self, *exception: Any) -> None:
        self._rng.__exit__(*exception)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for parameter, grad in self._grads:
            parameter.grad = grad
        for channels, mask in self._masks.items():
            channels.set(mask)


def _backward_of_everything(model: nn.Module, example: Any) -> None:
    args: tuple[Any, ...] = (example,)
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    with torch.enable_grad():
        leaves = tree_leaves(model(*args, **kwargs))
        outputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError("model: expected an output that needs a gradient, got none")
        # A random weighting: a plain sum has zero gradient below a softmax or a norm.
        total = sum((t.float() * torch.randn_like(t, dtype=torch.float32)).sum() for t in outputs)
    assert isinstance(total, Tensor)
    total.backward()


def _neuron_layers(model: nn.Module) -> list[NeuronLayer]:
    found = [layer for _, layer in named_neuron_layers(model)]
    if not found:
        raise ValueError("model: expected a converted model, got no neuron layers; call convert")
    return found


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _stock_class(module: nn.Module) -> type[nn.Module]:
    return next(stock for stock, ours in _NEURON_CLASSES.items() if isinstance(module, ours))


def _torchvision() -> Any:
    """Our torchvision support, if the user's program has imported torchvision's models."""
    if "torchvision.models.swin_transformer" not in sys.modules:
        return None
    from neq_kernels.integrations import torchvision

    return torchvision


def _replacements() -> dict[type[nn.Module], type[nn.Module]]:
    support = _torchvision()
    return support.REPLACEMENTS if support else {}


def _replaced_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    table = _replacements()
    for module in model.modules():
        if type(module) in table:
            yield module, table[type(module)]


def _reasons(model: nn.Module, filter: Filter | None, norms: bool) -> dict[str, str | None]:
    """For each module why it is not converted; None: it can be."""
    support = _torchvision()
    bypassing: tuple[type, ...] = (nn.MultiheadAttention, *(support.BYPASSING if support else ()))
    bypassed = {
        child: type(module).__name__
        for module in model.modules()
        if isinstance(module, bypassing)
        for child in module.modules()
        if child is not module
    }
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if module in bypassed:
            reasons[name] = f"{bypassed[module]} uses its weight without calling it"
        else:
            reasons[name] = _own_reason(name, module, filter, norms)
    candidates = {
        id(m) for n, m in model.named_modules() if reasons[n] is None or isinstance(m, NeuronLayer)
    }
    elsewhere = {
        id(p): name
        for name, module in model.named_modules()
        if id(module) not in candidates
        for p in module.parameters(recurse=False)
    }
    neurons: dict[int, set[NeuronLayout]] = {}
    for module in model.modules():
        if id(module) in candidates:
            neurons.setdefault(id(module.weight), set()).add(_layout(module))
    for name, module in model.named_modules():
        if reasons[name] is not None or isinstance(module, NeuronLayer):
            continue
        weight = module.weight
        if id(weight) in elsewhere:
            reasons[name] = f"its weight is shared with {elsewhere[id(weight)] or 'the model'}"
        elif len(neurons[id(weight)]) > 1:
            reasons[name] = "its weight is shared with a layer that sees other neurons in it"
    return reasons


def _layout(module: nn.Module) -> NeuronLayout:
    """Where a neuron lies in the weight of a layer, converted or not."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return NeuronLayout(module.groups, axis=1)
    return NeuronLayout()


def _own_reason(name: str, module: nn.Module, filter: Filter | None, norms: bool) -> str | None:
    if isinstance(module, NeuronLayer):
        return None
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized"
    if kind not in _NEURON_CLASSES:
        base = next((c.__name__ for c in _NEURON_CLASSES if isinstance(module, c)), None)
        return f"a subclass of {base}" if base else "not a supported layer type"
    if not isinstance(module._parameters.get("weight"), Parameter):
        if "weight" in module._parameters:
            return "it has no weight (affine=False)"
        return "its weight is computed (weight norm, spectral norm, pruning)"
    weight = cast(Parameter, module.weight)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight is empty: {tuple(weight.shape)}"
    if kind is nn.LayerNorm and weight.dim() != 1:
        return "it normalises over more than one dimension"
    if issubclass(_NEURON_CLASSES[kind], layers._Norm) and not norms:
        return "norms=False"
    if filter is not None and not filter(name, module):
        return "left out by filter"
    return None


def _other_reason(follows: bool) -> str:
    if follows:
        return "owned by no neuron: follows its block"
    return "owned by no neuron: always active, keeps backprop alive to where it sits"


def _follow(model: nn.Module, stopped: StoppedParameters) -> None:
    owners = layers.neuron_owners(model)
    parents = {child: module for module in model.modules() for child in module.children()}
    followers: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or parameter in owners:
                continue
            block = module
            while block in parents and not _deciding_layers(block, model):
                block = parents[block]
            if _deciding_layers(block, model):
                followers.setdefault(block, []).append((module, name))
    for block, places in followers.items():
        block.neq_following = FollowingParameters(  # type: ignore[assignment]
            block, _deciding_layers(block, model), places, stopped
        )


def _deciding_layers(block: nn.Module, model: nn.Module) -> list[NeuronLayer]:
    """The neuron layers of a block; of the whole model all but the last, its output."""
    found = [layer for _, layer in named_neuron_layers(block)]
    return found[:-1] if block is model else found
