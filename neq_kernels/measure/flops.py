"""FLOP accounting, by two conventions that must never be mixed.

``paper``
    What the NEq paper's "Bprop. FLOPs per iteration" column means: 2 x the forward MACs of one
    image x the active share of each layer, that is ONE of the two backward GEMMs.
``executed``
    Forward, input gradients (dgrad) and weight gradients (wgrad) apart, 2 FLOPs per MAC, as an
    eager training step needs them with the present masks: wgrad for active neurons only, no dgrad
    where nothing below learns. A backend may choose to compute more than that, where it is faster.

Counting rule, MACs: convolution = output elements x (Cin / groups x kernel + bias); transposed
convolution = input elements x (Cout / groups x kernel) + output elements x bias; linear = input
features x output elements; norm = 2 x elements; any other product with a parameter (``x @ w``,
einsum, grouped and batched products, recurrent layers) = the multiplications of that product.
Products between activations, as inside attention, pooling, activations and additions are not
counted, in keeping with the published figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.traversal import Owners, neuron_owners, unwrap
from neq_kernels.measure.recorder import LayerCall, Recorder, batch_size

Convention = Literal["paper", "executed"]
CONVENTIONS: tuple[Convention, ...] = ("paper", "executed")
FLOPS_PER_MAC = 2
COUNTED_MODULES = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class LayerFlops:
    """One layer, or another parameter that is multiplied by, for one image.

    Attributes:
        name: of the layer, or of the parameter where that is not a layer's ``weight``.
        kind: ``conv``, ``linear``, ``norm``, ``bilinear``, ``recurrent`` or ``product``.
        calls: in one forward.
        neurons: of which ``active`` are updated. Of a parameter that no neuron owns: its rows, all
            active. 0 for a norm layer without parameters.
        macs: of the forward.
        dgrad_macs, wgrad_macs: what the backward executes now.
        bypassed_macs: those of ``macs`` in which a neuron layer's weight is used without calling
            the layer: their weight gradient is dense, whatever the mask.
        parameter: the full name of the parameter; empty where it is none of the model's.
        owned: whether neurons that can be frozen own it.
    """

    name: str
    kind: str
    calls: int
    neurons: int
    active: int
    macs: int
    dgrad_macs: int
    wgrad_macs: int
    bypassed_macs: int = 0
    parameter: str = ""
    owned: bool = field(default=False, compare=False)

    @property
    def active_share(self) -> float:
        """K' / K, and 1 for the MACs that bypass the layer; 0 where there is nothing to learn."""
        return self.share_if(self.active / self.neurons if self.neurons else 0.0)

    def share_if(self, active_share: float) -> float:
        """:attr:`active_share` with another share of the neurons active."""
        bypassed = self.bypassed_macs / self.macs if self.macs else 0.0
        return bypassed + (1 - bypassed) * active_share


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one image through a model, with the masks of the moment it was counted.

    ``layers`` in the order of their first call: layers, and whatever else multiplies by a
    parameter. ``not_called`` names conv, linear and norm modules that the forward never used (an
    auxiliary head that only runs in training, for instance): nothing of theirs is in the totals.
    ``masks`` are those of the rows that neurons own and that learn, by name: bool[neurons].
    """

    layers: tuple[LayerFlops, ...]
    not_called: tuple[str, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def macs(self) -> int:
        """Forward MACs."""
        return sum(layer.macs for layer in self.layers)

    @property
    def owned(self) -> float:
        """Share of the MACs of products with a parameter that neurons own: 0 to 1. Only there can
        a weight gradient be saved; :attr:`unowned` has the rest."""
        products = [layer for layer in self.layers if layer.kind != "norm"]
        total = sum(layer.macs for layer in products)
        owned = sum(layer.macs - layer.bypassed_macs for layer in products if layer.owned)
        return owned / total if total else 0.0

    @property
    def unowned(self) -> tuple[LayerFlops, ...]:
        """The rows that no neuron owns, and those that bypass their layer; most MACs first."""
        rows = [row for row in self.layers if (row.neurons and not row.owned) or row.bypassed_macs]
        return tuple(sorted(rows, key=lambda row: -row.macs))

    @property
    def paper(self) -> float:
        """FLOPs by the paper's convention: ONE backward GEMM."""
        return sum(FLOPS_PER_MAC * layer.macs * layer.active_share for layer in self.layers)

    @property
    def forward(self) -> int:
        """Executed FLOPs of the forward."""
        return FLOPS_PER_MAC * self.macs

    @property
    def dgrad(self) -> int:
        """Executed FLOPs of the input gradients."""
        return FLOPS_PER_MAC * sum(layer.dgrad_macs for layer in self.layers)

    @property
    def wgrad(self) -> int:
        """Executed FLOPs of the weight gradients."""
        return FLOPS_PER_MAC * sum(layer.wgrad_macs for layer in self.layers)

    @property
    def executed(self) -> int:
        """Executed FLOPs of forward and backward."""
        return self.forward + self.dgrad + self.wgrad

    def total(self, convention: Convention) -> float:
        """FLOPs by the given convention.

        Raises:
            ValueError: a convention other than ``paper`` or ``executed``.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: expected one of {CONVENTIONS}, got {convention!r}")
        return self.paper if convention == "paper" else self.executed

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, totals included, ready for JSON."""
        totals = {
            name: getattr(self, name)
            for name in ("macs", "paper", "forward", "dgrad", "wgrad", "executed")
        }
        layers = tuple(asdict(layer) for layer in self.layers)
        return totals | {"layers": layers, "not_called": self.not_called}


def count(model: nn.Module, example: Any) -> FlopCount:
    """FLOPs of one image, plain and converted models alike, with their present masks.

    Runs one forward in eval mode with gradients enabled (what needs a gradient decides which dgrads
    are executed) and leaves modes, buffers and random state as they were.

    Args:
        model: wrapped by DistributedDataParallel or ``torch.compile`` or not.
        example: a batch of one or more images. A tensor is passed as ``model(x)``, of a tuple or
            list the first element, a dict as ``model(**example)``; moved to the model's device.
            Totals are divided by the batch size.

    Raises:
        ValueError: nothing was multiplied by a parameter, or ``example`` holds no batch.
        TypeError: ``example`` is none of the above.
    """
    model = unwrap(model)
    images = images_in(example)
    recorder = Recorder(model)
    run_recorded(model, example, recorder)
    return summed(model, recorder.calls, images)


def run_recorded(model: nn.Module, example: Any, recorder: Recorder) -> Any:
    """One forward as :func:`count` runs it, watched; returns its output."""
    with _undisturbed(model), torch.enable_grad(), recorder.watching(example):
        output = _call(model, example)
    if not recorder.calls:
        raise ValueError(
            "model: no convolution, linear or norm layer ran on the example, nor any other product "
            "with a parameter"
        )
    return output


def summed(model: nn.Module, calls: Sequence[LayerCall], images: int) -> FlopCount:
    """The calls of one forward of ``images``, by layer, for one image."""
    rows = tuple(_rows(model, calls, images))
    return FlopCount(rows, tuple(_not_called(model, calls)), _masks(model, calls))


def images_in(example: Any) -> int:
    """The batch size of an example of :func:`count`; raises as it does."""
    if not isinstance(example, Tensor | tuple | list | dict):
        raise TypeError(
            f"example: expected a tensor, tuple, list or dict, got {type(example).__name__}"
        )
    return batch_size(example)


def frozen_fraction(model: nn.Module, flop_count: FlopCount) -> float:
    """Share of the model that is frozen now, weighted by forward MACs: 0 (all active) to 1.

    What cannot learn (``requires_grad=False``: the base of a LoRA model) is in neither part: its
    saving is not NEq's. Parameters that no neuron owns are active, and so is what bypasses its
    layer. Norm layers without parameters are left out.

    Args:
        model: the model of :func:`count`, with any masks.
        flop_count: its count; the masks at that time do not matter.
    """
    model = unwrap(model)
    owners = neuron_owners(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = active = 0.0
    for row in flop_count.layers:
        parameter = parameters.get(row.parameter)
        learns = row.active > 0 if parameter is None else parameter.requires_grad
        if not row.neurons or not learns:
            continue
        total += row.macs
        sharing = owners.get(parameter, []) if parameter is not None else []
        active += row.macs * row.share_if(active_share(sharing))
    return 1 - active / total if total else 0.0


def human(flops: float) -> str:
    """As the paper prints it: ``138.94M``, ``3.64G``."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= scale:
            return f"{flops / scale:.2f}{unit}"
    return f"{flops:.0f}"


def _rows(model: nn.Module, calls: Sequence[LayerCall], images: int) -> Iterator[LayerFlops]:
    owners, by_neurons = neuron_owners(model), neuron_owners(model, following=False)
    names = {p: name for name, p in model.named_parameters()}
    by_name: dict[str, list[LayerCall]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    for name, same in by_name.items():
        first = same[0]
        neurons, active = _neurons(first, owners)
        macs = sum(call.macs for call in same)
        learns = first.parameter is not None and first.parameter.requires_grad
        bypassed = sum(call.macs for call in same if call.bypasses and learns)
        dgrad = sum(call.macs - call.bias_macs for call in same if call.input_needs_grad)
        if getattr(first.owner, "grad_input", "exact") == "active":
            dgrad = dgrad * active // neurons
        whole = sum(call.macs for call in same if call.masked or call.kind == "norm")
        wgrad = bypassed + _wgrad_macs(macs - bypassed, whole, neurons, active)
        yield LayerFlops(
            name=name,
            kind=first.kind,
            calls=len(same),
            neurons=neurons,
            active=active,
            macs=macs // images,
            dgrad_macs=dgrad // images,
            wgrad_macs=wgrad // images,
            bypassed_macs=bypassed // images,
            parameter=names.get(first.parameter, "") if first.parameter is not None else "",
            owned=first.parameter in by_neurons,
        )


def _wgrad_macs(macs: int, whole: int, neurons: int, active: int) -> int:
    """Of which ``whole`` have a gradient that is computed whole, if at all: norm layers, and layers
    whose weight is masked."""
    return whole + (macs - whole) * active // neurons if active else 0


def _neurons(call: LayerCall, owners: Owners) -> tuple[int, int]:
    """Neurons, and active neurons, of what a call multiplies by."""
    parameter, weight = call.parameter, call.weight
    if parameter is not None and parameter in owners:
        channels = _most_active(owners[parameter])
        return len(channels), channels.n_active if parameter.requires_grad else 0
    if weight is None:
        return 0, 0
    rows = (weight if parameter is None else parameter).shape[:1].numel()
    neurons = getattr(call.owner, "out_channels", rows)
    return neurons, neurons if weight.requires_grad else 0


def _masks(model: nn.Module, calls: Sequence[LayerCall]) -> dict[str, Tensor]:
    owners = neuron_owners(model)
    return {
        call.name: _most_active(owners[call.parameter]).mask
        for call in reversed(calls)  # of several calls the first counts, as in the rows
        if call.parameter in owners and call.parameter.requires_grad
    }


def _most_active(sharing: Iterable[tuple[ActiveChannels, NeuronLayout]]) -> ActiveChannels:
    return max((channels for channels, _ in sharing), key=lambda c: c.n_active / len(c))


def active_share(sharing: Iterable[tuple[ActiveChannels, NeuronLayout]]) -> float:
    """Of a parameter's neurons, by their owners; 1 without any."""
    return max((channels.n_active / len(channels) for channels, _ in sharing), default=1.0)


def _not_called(model: nn.Module, calls: Iterable[LayerCall]) -> Iterator[str]:
    called = {id(call.owner) for call in calls} | {id(call.parameter) for call in calls}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        counted = isinstance(module, COUNTED_MODULES) and weight is not None
        if counted and id(module) not in called and id(weight) not in called:
            yield name


def _call(model: nn.Module, example: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(example, Mapping):
        return model(**{k: _moved(v, device) for k, v in example.items()})
    return model(_moved(example if isinstance(example, Tensor) else example[0], device))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, run eagerly; each module's mode and the random state come back."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
