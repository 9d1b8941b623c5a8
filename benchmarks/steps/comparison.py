"""One training step of several providers in turns: gradients compared, times and bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import neq_kernels as neq
from benchmarks.common import cli
from benchmarks.common.records import Row
from benchmarks.common.workloads import Layout, Workload, random_masks, set_masks
from benchmarks.steps import goals, peers
from benchmarks.steps.certainty import Interval, median_interval, until_certain
from benchmarks.steps.correctness import BFLOAT16, FLOAT32, Tolerance, differences
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.traversal import named_neuron_layers
from neq_kernels.measure import StepShares, Variant, backward_shares, bound, flops, step_time
from neq_kernels.measure import frozen_parameter_fraction as frozen_parameters
from neq_kernels.measure.timing import PHASES, Quantiles, StepTimes

WARMUP, MOST_ROUNDS = 2, 60
# Steps between two looks whether anything is still measured, and all of them.
SETTLING, MOST_SETTLING = 6, 18


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    # A small lr: no value may blow up or become denormal while the same step is timed again.
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
}


COLUMNS = (
    ("model", -18),
    ("layout", -6),
    ("dtype", -8),
    ("r", 4),
    ("provider", -8),
    ("step ms", 8),
    ("speed-up", 8),
    ("95 %", 13),
    ("width", 6),
    ("backward", 8),
    ("bound", 6),
    ("floored", 7),
    ("of bound", 8),
)


@dataclass(frozen=True)
class Provider:
    """A way to train. ``build`` gets a plain model and the optimizer's maker; ``masks`` sets the
    active channels."""

    name: str
    build: Callable[[nn.Module, Callable[..., Optimizer]], tuple[nn.Module, Optimizer]]
    masks: Callable[[nn.Module, dict[str, Tensor], float], None]


def _dense(model: nn.Module, make: Callable[..., Optimizer]) -> tuple[nn.Module, Optimizer]:
    return model, make(model.parameters())


def _peer(model: nn.Module, make: Callable[..., Optimizer]) -> tuple[nn.Module, Optimizer]:
    return peers.convert(model), make(model.parameters())


def _neq(model: nn.Module, make: Callable[..., Optimizer]) -> tuple[nn.Module, Optimizer]:
    neq.convert(model, others="follow")
    optimizer = make(model.parameters())
    neq.attach(optimizer, model)
    return model, optimizer


class _Alive(torch.autograd.Function):
    """Its first argument, needing a gradient for the sake of the second, which gets none."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(output)  # not a view: in-place activations must follow
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None]:
        return None, None


def without_wgrads(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """``model``, changed: the named layers learn nothing, but backprop comes down to each of
    them."""
    token = torch.zeros(1, requires_grad=True)

    def keep_alive(module: nn.Module, args: object, output: Any) -> Any:
        if isinstance(output, tuple):  # of attention, with its weights
            return keep_alive(module, args, output[0]), *output[1:]
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        return _Alive.apply(output, token)

    for name in names:
        layer = model.get_submodule(name)
        layer.requires_grad_(False)
        layer.register_forward_hook(keep_alive)
    return model


NO_WGRAD = "no wgrad"


DENSE = Provider("dense", _dense, lambda model, masks, r: None)


OURS = Provider(goals.OURS, _neq, lambda model, masks, r: set_masks(model, masks))


PEER = Provider(
    "peer1", _peer, lambda model, masks, r: peers.set_active(model, masks, others=r > 0)
)


PROVIDERS = (DENSE, PEER, OURS)


@dataclass(frozen=True)
class StepOptions:
    """What is the same in every cell.

    Attributes:
        seconds: for each cell, if that is more than ``least_rounds`` take.
        rounds_of_shares: in which the weight gradients are divided among the layers.
        again: cells whose interval is too wide are measured again.
    """

    optimizer: str
    seconds: float
    rounds_of_shares: int
    least_rounds: int
    again: bool = False


class Contest:
    """The providers of one model in one layout, built, and where the dense step's time goes.

    Args:
        providers: dense first; None: all.
    """

    def __init__(
        self,
        workload: Workload,
        layout: Layout,
        options: StepOptions,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        self._workload, self._layout, self._options = workload, layout, options
        self._providers = PROVIDERS if providers is None else providers
        self._batches = workload.batches(layout)
        make = OPTIMIZERS[options.optimizer]
        dense, *others = self._providers
        plain, optimizer = dense.build(workload.model(layout), make)
        self._shares: StepShares = backward_shares(
            plain, self._batches, workload.loss, make, warmup=1, repeats=options.rounds_of_shares
        )
        self._built = {dense.name: (plain, optimizer)}
        self._built |= {each.name: each.build(workload.model(layout), make) for each in others}
        products = [name for name, layer in named_neuron_layers(self._ours) if not layer.is_norm]
        passed = without_wgrads(workload.model(layout), products)
        learned = [p for p in passed.parameters() if p.requires_grad]
        self._no_wgrad = Variant(
            NO_WGRAD, passed, workload.loss, make(learned) if learned else None
        )

    @property
    def _ours(self) -> nn.Module:
        return self._built[OURS.name][0]

    def rows(self, r: float) -> Iterator[Row]:
        """With the share ``r`` of the channels active, provider by provider. What is wrong is not
        timed."""
        workload = self._workload
        about = {
            "model": workload.name,
            "layout": self._layout,
            "dtype": workload.dtype,
            "r": r,
            "images": workload.images,
        }
        masks = random_masks(self._ours, r)
        for provider in self._providers:
            provider.masks(self._built[provider.name][0], masks, r)
        models = {name: model for name, (model, _) in self._built.items()}
        wrong = differences(
            models, masks, self._batches[0], workload.loss, tolerance=tolerance_of(workload)
        )
        if wrong:
            yield from (about | {"provider": name, "error": text} for name, text in wrong.items())
        else:
            settle(Variant(OURS.name, self._ours, workload.loss), self._batches, masks)
            yield from self._timed(about)

    def _timed(self, about: Row) -> Iterator[Row]:
        workload, options, built, shares = self._workload, self._options, self._built, self._shares
        variants = [
            Variant(name, model, workload.loss, opt) for name, (model, opt) in built.items()
        ]
        variants.append(self._no_wgrad)
        rounds = round(options.seconds / (shares.seconds.median * len(variants)))

        def measure(rounds: int) -> StepTimes:
            return step_time(variants, self._batches, warmup=WARMUP, repeats=rounds)

        found = until_certain(
            measure,
            lambda times: times.ratios(OURS.name, over=DENSE.name),
            min(max(rounds, options.least_rounds), MOST_ROUNDS),
            again=options.again,
        )
        times = found.times
        dense = times[DENSE.name]
        pairs = zip(dense.backward, times[NO_WGRAD].backward, strict=True)
        wgrads = Quantiles.of([whole - passed for whole, passed in pairs])
        phases = {phase: dense.quantiles(phase).median for phase in PHASES}
        shares = shares.rescaled(dense.quantiles(), phases, wgrads.median)
        now = flops.count(self._ours, self._batches[0][0][:1])
        frozen = frozen_parameters(self._ours)
        bounds: Row = {
            "bound": bound(shares, now, frozen),
            "bound_floor": bound(shares, now, frozen, floor=True),
            "wgrad_share": shares.wgrad,
            "read_bandwidth": shares.read_bandwidth,
            "write_bandwidth": shares.write_bandwidth,
        }
        for name in (*built, NO_WGRAD):
            row = about | {"provider": name, "rounds": len(times[name].total)}
            for phase in (*PHASES, "total"):
                row |= flat(f"{phase}_seconds", times[name].quantiles(phase))
            if name != DENSE.name:
                row |= flat("speedup", times.speedup(name, over=DENSE.name))
                row |= certainty(median_interval(times.ratios(name, over=DENSE.name)))
                backward = times.speedup(name, over=DENSE.name, phase="backward")
                row |= flat("backward_speedup", backward)
            if name not in (DENSE.name, NO_WGRAD):
                row |= bounds | of_bounds(row["speedup_median"], bounds)
            if name == OURS.name:
                row |= {"tries": found.tries, "wide": found.wide}
            yield row


def settle(ours: Variant, batches: Sequence[Any], masks: dict[str, Tensor]) -> None:
    """Steps in which the library measures what it is in doubt of, as far as it allows itself; what
    it found serves from the next change of masks on, which this is."""
    for _ in range(MOST_SETTLING // SETTLING):
        if not selector.contests:
            break
        step_time(ours, batches, warmup=0, repeats=SETTLING)
    for _, layer in named_neuron_layers(ours.model):
        layer.channels.reset()
    set_masks(ours.model, masks)


def tolerance_of(workload: Workload) -> Tolerance:
    """What the gate lets pass."""
    return FLOAT32 if workload.autocast is None else BFLOAT16


def of_bounds(speedup: float, bounds: Row) -> Row:
    """What share of either bound was reached."""
    return {"ratio": speedup / bounds["bound"], "ratio_floor": speedup / bounds["bound_floor"]}


def certainty(interval: Interval | None) -> Row:
    """The interval of a speed-up as columns of a row; none of too few rounds."""
    if interval is None:
        return {}
    low, high = interval.low, interval.high
    return {"speedup_low": low, "speedup_high": high, "speedup_width": interval.width}


def flat(name: str, quantiles: Quantiles) -> dict[str, float]:
    """Quantiles as columns of a row."""
    return {f"{name}_{level}": value for level, value in asdict(quantiles).items()}


def cells(row: Row) -> tuple[list[str], str]:
    """A row as it is printed, and the verdict. Only ours has goals to reach."""
    texts = [row["model"], row["layout"], row["dtype"], f"{row['r']:g}", row["provider"]]
    verdict = ""
    if "error" in row:
        verdict = cli.red(f"WRONG {row['error']}")
    else:
        texts.append(f"{1e3 * row['total_seconds_median']:.1f}")
    if "speedup_median" in row:
        interval = "speedup_low" in row
        texts += [
            f"{row['speedup_median']:.3f}",
            f"{row['speedup_low']:.3f}-{row['speedup_high']:.3f}" if interval else "",
            f"{row['speedup_width']:.1%}" if interval else "",
            f"{row['backward_speedup_median']:.3f}",
        ]
    if "bound" in row:
        texts += [f"{row['bound']:.3f}", f"{row['bound_floor']:.3f}", f"{row['ratio_floor']:.3f}"]
    if row["provider"] == OURS.name and "bound" in row:
        short = goals.short_of(row)
        verdict = cli.verdict(not short, ", ".join(short)) + (" (wide)" if row["wide"] else "")
    return [*texts, *[""] * (len(COLUMNS) - len(texts))], verdict
