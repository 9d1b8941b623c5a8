"""Where the time of a dense step goes, layer by layer, and how much of it freezing can save.

A layer's backward costs its weight gradient (wgrad: what it takes longer than without one) and
everything else from the moment the gradient of its output arrives to the moment the next layer's
does: its input gradient (dgrad), and the activations and additions below. Freezing neurons saves
wgrad; only where nothing below learns the rest goes too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq_kernels.conversion.convert import revert
from neq_kernels.layers.traversal import neuron_owners, unwrap
from neq_kernels.machine import Machine, machine
from neq_kernels.measure.bandwidth import read_bandwidth, write_bandwidth
from neq_kernels.measure.cache_lines import ChannelLines
from neq_kernels.measure.flops import FlopCount
from neq_kernels.measure.products import PRODUCTS
from neq_kernels.measure.recorder import LayerCall, Recorder
from neq_kernels.measure.timing import PHASES, Loss, PhaseClock, Quantiles, Variant, run_step

OPERANDS = ("input", "weight", "bias")
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Moved = tuple[int, int, int, ChannelLines | None]  # the last four fields of LayerShare


@dataclass(frozen=True)
class LayerShare:
    """Shares of the dense step: ``wgrad``, and ``dgrad``, all the rest of the layer's backward
    that a stop of backprop would save (0 for a layer that has no input gradient anyway); and the
    bytes of its input, of its output's gradient and of its weight's gradient in one step (None
    where nobody measured). ``lines`` is how that gradient of its output lies in memory, whose
    format is taken to be the output's (None where channels lie in planes of their own, where calls
    differ, and where nobody measured)."""

    name: str
    wgrad: float
    dgrad: float
    input_bytes: int | None = None
    grad_output_bytes: int | None = None
    grad_weight_bytes: int | None = None
    lines: ChannelLines | None = None

    def grad_output_share(self, mask: Tensor) -> float:
        """Of the bytes of its output's gradient, the least that a wgrad of the active channels
        reads: the lines that they lie in.

        Args:
            mask: bool[K] on the CPU, True where active.
        """
        if self.lines is None or self.lines.channels != len(mask):
            return float(mask.double().mean())
        return self.lines.touched(mask)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> LayerShare:
        """What ``asdict`` wrote."""
        lines = saved.get("lines")
        return cls(**saved | {"lines": None if lines is None else ChannelLines(**lines)})


@dataclass(frozen=True)
class StepShares:
    """Medians of one dense step, as shares of it. ``seconds`` are its absolute time,
    ``read_bandwidth`` and ``write_bandwidth`` bytes per second
    (:mod:`neq_kernels.measure.bandwidth`; None where nobody measured)."""

    seconds: Quantiles
    forward: float
    backward: float
    optimizer: float
    layers: tuple[LayerShare, ...]
    machine: Machine = field(default_factory=machine)
    read_bandwidth: float | None = None
    write_bandwidth: float | None = None

    @property
    def wgrad(self) -> float:
        """Share of all weight gradients."""
        return sum(layer.wgrad for layer in self.layers)

    def floor(self, layer: LayerShare, read_share: float) -> float:
        """The least that a layer's wgrad can cost, as a share of the dense step: reading its input
        once, and ``read_share`` of its output's gradient
        (:meth:`LayerShare.grad_output_share`), at ``read_bandwidth``, and writing the whole
        gradient of its weight, zeros included, at ``write_bandwidth``. 0 where nothing is read, at
        most the dense wgrad. What still lies in a cache is read and written faster.

        Raises:
            ValueError: bandwidths or bytes were not measured.
        """
        reads, writes = self.read_bandwidth, self.write_bandwidth
        x, dy, dw = layer.input_bytes, layer.grad_output_bytes, layer.grad_weight_bytes
        if reads is None or writes is None or x is None or dy is None or dw is None:
            raise ValueError("shares: expected bytes and bandwidths, got ones saved without")
        if read_share == 0:
            return 0.0
        seconds = (x + read_share * dy) / reads + dw / writes
        return min(layer.wgrad, seconds / self.seconds.median)

    def rescaled(self, seconds: Quantiles, phases: Mapping[str, float], wgrad: float) -> StepShares:
        """The same layers with the totals of another measurement of the same step: the machine's
        speed drifts, and with it what the phases are of each other.

        Args:
            seconds: of the whole step.
            phases: seconds of ``forward``, ``backward`` and ``optimizer``.
            wgrad: seconds of all weight gradients together.
        """
        total = sum(phases[name] for name in PHASES)
        wgrads = _ratio(wgrad, total * self.wgrad)
        rest = _ratio(phases["backward"] - wgrad, total * (self.backward - self.wgrad))
        layers = tuple(
            replace(layer, wgrad=layer.wgrad * wgrads, dgrad=layer.dgrad * rest)
            for layer in self.layers
        )
        return replace(
            self,
            seconds=seconds,
            forward=phases["forward"] / total,
            backward=phases["backward"] / total,
            optimizer=phases["optimizer"] / total,
            layers=layers,
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; :meth:`from_dict` is the way back."""
        return asdict(self) | {"wgrad": self.wgrad}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StepShares:
        """The shares that :meth:`to_dict` wrote."""
        return cls(
            seconds=Quantiles(**saved["seconds"]),
            layers=tuple(LayerShare.from_dict(layer) for layer in saved["layers"]),
            machine=Machine(**saved["machine"]),
            read_bandwidth=saved.get("read_bandwidth"),
            write_bandwidth=saved.get("write_bandwidth"),
            **{name: saved[name] for name in ("forward", "backward", "optimizer")},
        )


def backward_shares(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    make_optimizer: MakeOptimizer | None = None,
    *,
    warmup: int = 2,
    repeats: int = 10,
) -> StepShares:
    """Measure the shares of a dense training step.

    Works on a plain copy of ``model`` (converted layers reverted, wrappers removed) in the mode the
    model is in, so neither the model nor its masks are touched; that takes the memory of a second
    model and of two more sets of activations. Every round times a step as it is, the layers' weight
    gradients by themselves, and the arrival of each layer's gradient; shares are ratios of medians.

    Args:
        model: plain or converted.
        batches: inputs on the model's device; they rotate.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar.
        make_optimizer: called with the copy's parameters; without it the optimizer's share is 0.
        warmup: rounds thrown away.
        repeats: rounds recorded.

    Raises:
        ValueError: no batches, ``warmup`` < 0, ``repeats`` < 1, or no layer with a gradient.
    """
    if len(batches) == 0:
        raise ValueError("batches: expected at least one, got none")
    if warmup < 0 or repeats < 1:
        raise ValueError(f"expected warmup >= 0 and repeats >= 1, got {warmup} and {repeats}")
    plain = revert(copy.deepcopy(unwrap(model)))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = None if make_optimizer is None else make_optimizer(parameters)
    variant = Variant("dense", plain, loss, optimizer)
    cuda = [variant.device] if variant.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        return _measure(variant, batches, warmup, repeats)


def bound(
    shares: StepShares, now: FlopCount, frozen_parameters: float = 0.0, *, floor: bool = False
) -> float:
    """The most that the present masks can speed a step up, by measured shares of the dense step:
    ``1 / (1 - sum(wgrad * frozen share) - sum(dgrad where backprop stops) - optimizer * f)``.

    Args:
        shares: of the dense step.
        now: :func:`neq_kernels.flops.count` of the same model with the masks in question. Layers
            that it did not see run (auxiliary heads, used in training only) are taken as active.
        frozen_parameters: ``f``, the share of parameters the optimizer need not touch
            (:func:`frozen_parameter_fraction`).
        floor: the tighter bound, in which no layer's wgrad costs less than reading what it needs
            (:meth:`StepShares.floor`): of its output's gradient the lines that hold channels active
            in ``now.masks``, or for a layer without a mask there its ``active_share``.

    Raises:
        ValueError: the two do not describe the same layers, ``frozen_parameters`` is not in 0..1,
            or ``floor`` is asked of shares that hold no bandwidth.
    """
    if not 0 <= frozen_parameters <= 1:
        raise ValueError(f"frozen_parameters: expected 0..1, got {frozen_parameters}")
    counted = {layer.name: layer for layer in now.layers}
    saved = shares.optimizer * frozen_parameters
    for layer in shares.layers:
        if layer.name in now.not_called:
            continue
        if layer.name not in counted:
            raise ValueError(f"now: expected a count of the measured model, no layer {layer.name}")
        row = counted[layer.name]
        needed = layer.wgrad * row.active_share
        if floor:
            read = row.active_share
            if (mask := now.masks.get(layer.name)) is not None:
                read = row.share_if(layer.grad_output_share(mask))
            needed = max(needed, shares.floor(layer, read))
        saved += layer.wgrad - needed
        if row.dgrad_macs == 0:
            saved += layer.dgrad
    return 1 / (1 - saved)


def frozen_parameter_fraction(model: nn.Module) -> float:
    """Share of the model's parameter elements that are frozen now: 0 (all active) to 1. A weight
    shared by several layers is active where any of them is."""
    total = frozen = 0.0
    owners = neuron_owners(model)
    for parameter in unwrap(model).parameters():
        total += parameter.numel()
        sharing = owners.get(parameter, [])
        if sharing:
            active = torch.stack([channels.mask for channels, _ in sharing]).any(dim=0)
            frozen += parameter.numel() * (1 - float(active.double().mean()))
    return frozen / total if total else 0.0


def _measure(variant: Variant, batches: Sequence[Any], warmup: int, repeats: int) -> StepShares:
    steps, layers = PhaseClock(variant.device), PhaseClock(variant.device)
    arrivals: list[dict[str, float]] = []
    has_dgrad: dict[str, bool] = {}
    moved: dict[str, Moved] = {}
    for i in range(warmup + repeats):
        if i == warmup:
            steps, layers = PhaseClock(variant.device), PhaseClock(variant.device)
            arrivals.clear()
        batch = batches[i % len(batches)]
        run_step(variant, batch, steps)
        traced = _TracedStep(variant, batch)
        arrivals.append(traced.backward_by_layer())
        traced.replay_weight_gradients(layers)
        has_dgrad, moved = traced.has_dgrad, traced.moved
        del traced  # the next step is to find the memory that a step of its own kind leaves
    if not any(arrivals[0].keys() & has_dgrad.keys()):
        raise ValueError("model: no convolution, linear or norm layer got a gradient")
    medians = {phase: Quantiles.of(samples).median for phase, samples in steps.samples.items()}
    step = Quantiles.of([sum(s) for s in zip(*steps.samples.values(), strict=True)])
    total = sum(medians.values())
    traced_total = sum(_median(arrivals, name) for name in arrivals[0])
    # The hooks of the traced backward take time too: its layers share the time of the clean one.
    scale = medians["backward"] / traced_total
    shares = []
    for name, propagates in has_dgrad.items():
        if name not in arrivals[0]:  # its output is not part of the loss
            continue
        whole = scale * _median(arrivals, name)
        more = Quantiles.of(layers.samples[name]).median if name in layers.samples else 0.0
        wgrad = min(max(more, 0.0), whole) if propagates else whole
        bytes_moved = moved.get(name, (0, 0, 0, None))
        shares.append(LayerShare(name, wgrad / total, (whole - wgrad) / total, *bytes_moved))
    return StepShares(
        seconds=step,
        forward=medians["forward"] / total,
        backward=medians["backward"] / total,
        optimizer=medians["optimizer"] / total,
        layers=tuple(shares),
        read_bandwidth=read_bandwidth(variant.device),
        write_bandwidth=write_bandwidth(variant.device),
    )


def _ratio(a: float, b: float) -> float:
    return max(0.0, a) / b if b > 0 else 0.0


def _median(rounds: Sequence[dict[str, float]], name: str) -> float:
    return Quantiles.of([seconds.get(name, 0.0) for seconds in rounds]).median


class _TracedStep:
    """A forward whose layers are known: when their gradients arrive, and what their wgrads move."""

    def __init__(self, variant: Variant, batch: Any) -> None:
        self._clock = PhaseClock(variant.device)
        self._model = variant.model
        self._arrived: list[tuple[str, float]] = []
        self._products: list[_Product] = []
        self.has_dgrad: dict[str, bool] = {}
        self.moved: dict[str, Moved] = {}
        recorder = Recorder(variant.model, on_call=self._watch)
        with recorder.watching(batch):
            self._loss = variant.loss(variant.model, batch)

    def backward_by_layer(self) -> dict[str, float]:
        """Seconds from the arrival of each layer's output gradient to the next arrival; what comes
        before the first one is under the empty name."""
        start = self._clock.now()
        self._loss.backward()
        end = self._clock.now()
        self._model.zero_grad(set_to_none=True)
        events = [("", start), *self._arrived, ("", end)]
        seconds: dict[str, float] = {}
        for (name, at), (_, until) in itertools.pairwise(events):
            seconds[name] = seconds.get(name, 0.0) + until - at
        return seconds

    def replay_weight_gradients(self, clock: PhaseClock) -> None:
        """What each product's backward takes longer for its weight (and bias) gradient, from the
        last layer to the first. Alone, a weight gradient would take more: the gradient of the
        output, which both products of a backward read, would not be in the cache."""
        seconds: dict[str, float] = {}
        for product in reversed(self._products):
            spent = -self._backward_seconds(product, False) if product.propagates else 0.0
            spent += self._backward_seconds(product, True)
            seconds[product.name] = seconds.get(product.name, 0.0) + spent
        for name, spent in seconds.items():
            clock.samples.setdefault(name, []).append(spent)

    def _backward_seconds(self, product: _Product, learns: bool) -> float:
        output, leaves = product.again(learns)
        grad = torch.randn_like(output)
        start = self._clock.now()
        torch.autograd.grad(output, leaves, grad)
        return self._clock.now() - start

    def _watch(
        self,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not output.requires_grad:
            return

        def arrived(grad: Tensor) -> None:
            self._arrived.append((call.name, self._clock.now()))

        output.register_hook(arrived)
        self.has_dgrad[call.name] = self.has_dgrad.get(call.name, False) or call.input_needs_grad
        weight = call.weight
        if func in PRODUCTS and weight is not None and weight.requires_grad:
            # Linear layers have their channels last, convolutions before the dimensions of a plane.
            lines = ChannelLines.of(output, 1 - weight.dim()) if weight.dim() > 1 else None
            x, dy, dw, known = self.moved.get(call.name, (0, 0, 0, lines))
            input, cast = args[0] if args else kwargs["input"], _autocast_dtype(output)
            x += input.numel() * (cast or input.dtype).itemsize
            same = lines if lines == known else None
            self.moved[call.name] = (x, dy + output.nbytes, dw + weight.nbytes, same)
            propagates = call.input_needs_grad
            product = _Product(call.name, func, args, kwargs, _autocast_dtype(output), propagates)
            self._products.append(product)


@dataclass(frozen=True)
class _Product:
    """One call of a linear or convolution function. ``autocast`` is the dtype it ran in,
    ``propagates`` says whether its input needed a gradient."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None
    propagates: bool

    def again(self, learns: bool) -> tuple[Tensor, list[Tensor]]:
        """The call once more, on the same values: its output, and the leaves of its graph, the
        input if it ``propagates``, weight and bias if it ``learns``."""
        named = dict(zip(OPERANDS, self.args, strict=False)) | self.kwargs
        operands: list[Tensor | None] = [named.pop(name, None) for name in OPERANDS]
        learned = [learns and t is not None and t.requires_grad for t in operands[1:]]
        asked = [self.propagates, *learned]
        fresh = [
            None if tensor is None else tensor.detach().requires_grad_(want)
            for tensor, want in zip(operands, asked, strict=True)
        ]
        device_type = next(t.device.type for t in fresh if t is not None)
        with torch.autocast(device_type, self.autocast, enabled=self.autocast is not None):
            output = self.func(*fresh, *self.args[len(OPERANDS) :], **named)
        return output, [t for t in fresh if t is not None and t.requires_grad]


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
