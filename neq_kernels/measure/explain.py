"""explain: what freezing saves in a model now, where backprop stops, and what keeps it alive."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from neq_kernels.conversion.convert import convert
from neq_kernels.layers.traversal import neuron_layers, neuron_owners, unwrap
from neq_kernels.measure import flops
from neq_kernels.measure.flops import FlopCount, LayerFlops, human
from neq_kernels.measure.recorder import Recorder

SHOWN = 5


@dataclass(frozen=True)
class Backprop:
    """How far down backprop runs, in the order in which a forward uses parameters.

    Attributes:
        stops_after: the last layer that it does not reach, nor anything before it; None: it runs
            through the whole model.
        stopped: the number of such layers (and other products with a parameter).
        lowest: the first parameter with a gradient.
        kept_alive_by: parameters that no neuron owns, with a gradient, read before the first active
            neuron: but for them backprop would stop there.
        kept_alive_macs: MACs of the input gradients that are computed for them, for one image.
        bound: the most that freezing can speed a step up, by FLOPs of forward and backward alone:
            those of the dense step over those of this one. No measurement.
    """

    stops_after: str | None
    stopped: int
    lowest: str | None
    kept_alive_by: tuple[str, ...]
    kept_alive_macs: int
    bound: float


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printed as a table.

    Attributes:
        macs: of the forward's products with a parameter, for one image.
        converted: the share of them in neurons that can be frozen.
        unowned: what the other share is, most MACs first: parameters that no neuron owns, and
            layers whose weight is used without calling them (``bypassed_macs``).
        frozen: the share of MACs frozen now, of what can learn (:func:`flops.frozen_fraction`).
        backprop: with the present masks.
        following: the same with ``convert(..., others="follow")``.
        activation_bytes, dense_activation_bytes: kept for the backward of the example, now and with
            everything active. In eval mode: without what only training keeps.
        frozen_bytes: of the frozen rows of all parameters: what each optimizer state of the
            parameters' shape (momentum: 1, Adam: 2) holds for them.
    """

    macs: int
    converted: float
    unowned: tuple[LayerFlops, ...]
    frozen: float
    backprop: Backprop
    following: Backprop
    activation_bytes: int
    dense_activation_bytes: int
    frozen_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = list(self._rows())
        width = max(len(title) for title, _ in rows)
        return "\n".join(f"{title:<{width}}  {text}".rstrip() for title, text in rows)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "MACs in neurons", f"{self.converted:.1%} of {human(self.macs)}"
        for i, text in enumerate(_outside(self.unowned, self.macs)):
            yield "" if i else "  outside", text
        yield "frozen now", f"{self.frozen:.1%} of the MACs that can learn"
        yield from _backprop_rows(self.backprop)
        yield "bound on the step", f"{self.backprop.bound:.2f}x, by FLOPs (not measured)"
        if self.following != self.backprop:
            bound, where = self.following.bound, _where(self.following)
            yield 'others="follow"', f"bound {bound:.2f}x, backprop {where}"
        now, dense = _bytes(self.activation_bytes), _bytes(self.dense_activation_bytes)
        yield "kept for backward", f"{now}, dense {dense}"
        yield "frozen rows", f"{_bytes(self.frozen_bytes)}, again in each optimizer state"


def explain(model: nn.Module, example: Any) -> Explanation:
    """Tell what is in neurons, what is frozen, where backprop stops and why, and what that saves.

    Runs three forwards in eval mode, one of the model and two of a copy of it (all neurons active;
    ``others="follow"``), which takes the memory of a second model. Autograd's graph decides what
    gets a gradient. The model is left as found.

    Args:
        model: a converted model, wrapped or not, with the masks in question.
        example: a batch as :func:`neq_kernels.flops.count` takes it.

    Raises:
        ValueError: no neuron layers, nothing was multiplied by a parameter, or ``example`` holds no
            batch.
        TypeError: ``example`` is no tensor, tuple, list or dict.
    """
    inner = unwrap(model)
    neuron_layers(inner)
    images = flops.images_in(example)
    other = copy.deepcopy(inner)
    convert(other, filter=lambda *_: False, others="follow")  # its first forward shows who follows
    masks = [layer.channels.mask for layer in neuron_layers(other)]
    for layer in neuron_layers(other):
        layer.channels.reset()
    dense = _Forward(other, example, images)
    for layer, mask in zip(neuron_layers(other), masks, strict=True):
        layer.channels.set(mask)
    following = _Forward(other, example, images)
    now = _Forward(inner, example, images)
    return Explanation(
        macs=sum(row.macs for row in now.count.layers if row.kind != "norm"),
        converted=now.count.owned,
        unowned=tuple(row for row in now.count.unowned if row.kind != "norm"),
        frozen=flops.frozen_fraction(inner, now.count),
        backprop=now.backprop(dense.count),
        following=following.backprop(dense.count),
        activation_bytes=now.saved_bytes,
        dense_activation_bytes=dense.saved_bytes,
        frozen_bytes=_frozen_bytes(inner),
    )


class _Forward:
    """One forward: its FLOPs, what its graph keeps, and which parameters it reaches."""

    count: FlopCount

    def __init__(self, model: nn.Module, example: Any, images: int) -> None:
        self._images = images
        self._names = {p: name for name, p in model.named_parameters()}
        self._in_neurons = {
            p for layer in neuron_layers(model) for p, _ in layer.neuron_parameters()
        }
        known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}
        recorder = Recorder(model)
        with _noting_saved(saved):
            output = flops.run_recorded(model, example, recorder)
        self.saved_bytes = sum(size for key, size in saved.items() if key not in known)
        self.count = flops.summed(model, recorder.calls, images)
        self._calls = recorder.calls
        # By parameter with a gradient: autograd's number of the first operation that reads it.
        self._first_use = {p: n for p, n in _parameters_reached(output).items() if p in self._names}

    def backprop(self, dense: FlopCount) -> Backprop:
        calls, reached = self._calls, self._first_use
        alive = [call.input_needs_grad or call.parameter in reached for call in calls]
        stopped = alive.index(True) if True in alive else len(calls)
        needed_from = min((n for p, n in reached.items() if p in self._in_neurons), default=inf)
        in_order = sorted(reached, key=reached.__getitem__)
        needless = [p for p in in_order if reached[p] < needed_from and p not in self._in_neurons]
        first = {p for p, n in reached.items() if n == needed_from}
        for_them = [
            call.macs - call.bias_macs
            for call in calls
            if call.input_needs_grad and (call.sequence < needed_from or call.parameter in first)
        ]
        return Backprop(
            stops_after=calls[stopped - 1].name if stopped else None,
            stopped=len({call.name for call in calls[:stopped]}),
            lowest=self._names[in_order[0]] if in_order else None,
            kept_alive_by=tuple(self._names[p] for p in needless),
            kept_alive_macs=sum(for_them) // self._images if needless else 0,
            bound=dense.executed / self.count.executed,
        )


@contextmanager
def _noting_saved(saved: dict[int, int]) -> Iterator[None]:
    """Within it, ``saved`` collects the bytes of every storage that autograd keeps."""

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _parameters_reached(output: Any) -> dict[Parameter, int]:
    """Every leaf that a backward of ``output`` gives a gradient, with the sequence number of the
    first operation that reads it."""
    nodes = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    pending: list[Any] = [node for node in nodes if node is not None]
    seen = set(pending)
    found: dict[Parameter, int] = {}
    while pending:
        node = pending.pop()
        for below, _ in node.next_functions:
            leaf = getattr(below, "variable", None)
            if leaf is not None:
                found[leaf] = min(node._sequence_nr(), found.get(leaf, node._sequence_nr()))
            elif below is not None and below not in seen:
                seen.add(below)
                pending.append(below)
    return found


def _frozen_bytes(model: nn.Module) -> int:
    total = 0
    for parameter, sharing in neuron_owners(model).items():
        share = flops.active_share(sharing)
        total += round(parameter.nbytes * (1 - share))
    return total


def _outside(rows: Sequence[LayerFlops], macs: int) -> list[str]:
    """What is alike but for numbers in its name, together; most MACs first."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        why = "its layer is not called" if row.bypassed_macs else f"{row.kind}, no neuron owns it"
        found.setdefault((_pattern(row.parameter or row.name), why), []).append(row.macs)
    texts = [
        f"{_times(name, len(alike))}: {sum(alike) / macs:.1%} ({why})"
        for (name, why), alike in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    more = [f"and {len(texts) - SHOWN} more kinds"] if len(texts) > SHOWN else []
    return texts[:SHOWN] + more


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _times(pattern: str, n: int) -> str:
    return pattern if n == 1 else f"{pattern} ({n})"


def _where(backprop: Backprop) -> str:
    if backprop.stops_after is None:
        return f"runs down to {backprop.lowest}"
    layers = "layer" if backprop.stopped == 1 else "layers"
    return f"stops after {backprop.stops_after} ({backprop.stopped} {layers})"


def _backprop_rows(backprop: Backprop) -> Iterator[tuple[str, str]]:
    yield "backprop", _where(backprop)
    if backprop.kept_alive_macs:
        found = Counter(map(_pattern, backprop.kept_alive_by))
        names = [_times(name, n) for name, n in found.items()]
        more = f" and {len(names) - SHOWN} more kinds" if len(names) > SHOWN else ""
        yield "  kept alive by", f"{', '.join(names[:SHOWN])}{more}"
        yield "", f"{human(backprop.kept_alive_macs)} MACs of input gradients for them alone"


def _bytes(n: int) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} bytes"
