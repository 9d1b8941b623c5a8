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
features x output elements; norm = 2 x elements. The products inside attention, pooling,
activations and additions are not counted, in keeping with the published figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import unwrap
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
    """One layer, for one image. ``macs`` is its forward, ``dgrad_macs`` and ``wgrad_macs`` what its
    backward executes now; ``active`` of its ``neurons`` are updated (``neurons`` is 0 for a norm
    layer without parameters)."""

    name: str
    kind: str
    calls: int
    neurons: int
    active: int
    macs: int
    dgrad_macs: int
    wgrad_macs: int

    @property
    def active_share(self) -> float:
        """K' / K; 0 where there is nothing to learn."""
        return self.active / self.neurons if self.neurons else 0.0


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one image through a model, with the masks of the moment it was counted.

    ``layers`` in the order of their first call. ``not_called`` names conv, linear and norm modules
    that the forward never used (an auxiliary head that only runs in training, for instance):
    nothing of theirs is in the totals.
    """

    layers: tuple[LayerFlops, ...]
    not_called: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Forward MACs."""
        return sum(layer.macs for layer in self.layers)

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
        """Everything, totals included, ready for JSON."""
        totals = {
            name: getattr(self, name)
            for name in ("macs", "paper", "forward", "dgrad", "wgrad", "executed")
        }
        return totals | asdict(self)


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
        ValueError: no convolution, linear or norm layer ran, or ``example`` holds no batch.
        TypeError: ``example`` is none of the above.
    """
    if not isinstance(example, Tensor | tuple | list | dict):
        raise TypeError(
            f"example: expected a tensor, tuple, list or dict, got {type(example).__name__}"
        )
    model = unwrap(model)
    images = batch_size(example)
    recorder = Recorder(model)
    with _undisturbed(model), torch.enable_grad(), recorder.watching():
        _call(model, example)
    if not recorder.calls:
        raise ValueError("model: no convolution, linear or norm layer ran on the example")
    return FlopCount(
        layers=tuple(_rows(recorder.calls, images)),
        not_called=tuple(_not_called(model, recorder.calls)),
    )


def frozen_fraction(model: nn.Module, flop_count: FlopCount) -> float:
    """Share of the model that is frozen now, weighted by forward MACs: 0 (all active) to 1.

    Layers without neurons of their own (a norm layer without parameters) are left out; a layer that
    is not converted is active, unless its weight needs no gradient.

    Args:
        model: the model of :func:`count`, with any masks.
        flop_count: its count; the masks at that time do not matter.
    """
    modules = dict(unwrap(model).named_modules())
    layers = [layer for layer in flop_count.layers if layer.neurons]
    total = sum(layer.macs for layer in layers)
    active = sum(layer.macs * _share_now(modules.get(layer.name), layer) for layer in layers)
    return 1 - active / total if total else 0.0


def human(flops: float) -> str:
    """As the paper prints it: ``138.94M``, ``3.64G``."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= scale:
            return f"{flops / scale:.2f}{unit}"
    return f"{flops:.0f}"


def _rows(calls: Sequence[LayerCall], images: int) -> Iterator[LayerFlops]:
    by_name: dict[str, list[LayerCall]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    for name, same in by_name.items():
        first = same[0]
        neurons, active = _neurons(first.owner, first.weight)
        macs = sum(call.macs for call in same)
        dgrad = sum(call.macs - call.bias_macs for call in same if call.input_needs_grad)
        if isinstance(first.owner, NeuronLayer) and first.owner.grad_input == "active":
            dgrad = dgrad * active // neurons
        yield LayerFlops(
            name=name,
            kind=first.kind,
            calls=len(same),
            neurons=neurons,
            active=active,
            macs=macs // images,
            dgrad_macs=dgrad // images,
            wgrad_macs=_wgrad_macs(first.kind, macs, neurons, active) // images,
        )


def _wgrad_macs(kind: str, macs: int, neurons: int, active: int) -> int:
    if not active:
        return 0
    # A norm layer's gradients are computed whole and its frozen rows overwritten.
    return macs if kind == "norm" else macs * active // neurons


def _neurons(owner: nn.Module | None, weight: Tensor | None) -> tuple[int, int]:
    """Neurons and active neurons of the layer that ``weight`` belongs to."""
    own = getattr(owner, "weight", None)
    if isinstance(own, Tensor) and weight is not None and own.shape == weight.shape:
        weight = own
    if weight is None:
        return 0, 0
    if isinstance(owner, NeuronLayer):
        return len(owner.channels), owner.channels.n_active if weight.requires_grad else 0
    neurons = getattr(owner, "out_channels", weight.shape[0])
    return neurons, neurons if weight.requires_grad else 0


def _share_now(owner: nn.Module | None, layer: LayerFlops) -> float:
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, Tensor):
        return layer.active_share
    neurons, active = _neurons(owner, weight)
    return active / neurons


def _not_called(model: nn.Module, calls: Iterable[LayerCall]) -> Iterator[str]:
    called = {id(call.owner) for call in calls} | {id(call.weight) for call in calls}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        counted = isinstance(module, COUNTED_MODULES) and weight is not None
        if counted and id(module) not in called and id(weight) not in called:
            yield name


def _call(model: nn.Module, example: Any) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(example, Mapping):
        model(**{k: _moved(v, device) for k, v in example.items()})
    elif isinstance(example, Tensor):
        model(_moved(example, device))
    else:
        model(_moved(example[0], device))


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
