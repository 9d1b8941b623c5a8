"""Where the time of one cell goes, layer by layer: what a layer's weight gradient has to move and
may cost, what it costs, and how much of the distance from the bound is its own.

Timed inside whole steps, by hooks on autograd's nodes, in turns: dense, ours, and dense without
weight gradients. A layer's weight gradient is what its nodes take longer than without one; memory
is as cold as in training. The hooks cost every variant the same.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import Layout, Workload, random_masks
from benchmarks.steps.comparison import (
    DENSE,
    NO_WGRAD,
    OPTIMIZERS,
    OURS,
    WARMUP,
    StepOptions,
    settle,
    without_wgrads,
)
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.traversal import named_neuron_layers
from neq_kernels.measure import StepShares, Variant, backward_shares
from neq_kernels.measure import frozen_parameter_fraction as frozen_parameters
from neq_kernels.measure.problems import problems_of
from neq_kernels.measure.shares import LayerShare
from neq_kernels.measure.timing import PHASES, PhaseClock, Quantiles, run_step

ROUNDS = 15
FORWARD = "forward"
NODES = "backward"
Samples = dict[tuple[str, str], list[float]]  # by phase and layer


def name_of(model: str, layout: str, dtype: str, r: float) -> str:
    """The record of a cell's account."""
    return f"account_{model}_{layout}_{dtype}_{r:g}"


def write(
    folder: Path, workload: Workload, layout: Layout, r: float, options: StepOptions
) -> list[str]:
    """Measure a cell, and write its record; what is printed of it.

    Raises:
        ValueError: ``r`` is 0: nothing but the output layer is computed.
    """
    if r == 0:
        raise ValueError("--account: expected a share of active channels above 0, got 0")
    name = name_of(workload.name, layout, workload.dtype, r)
    about = {"model": workload.name, "layout": layout, "dtype": workload.dtype, "r": r}
    account = Account(workload, layout, r, options)
    with Record(folder, name, about) as record:
        for row in account.rows():
            record.add(row)
    most = sorted(record.rows, key=lambda row: -row["miss_us"])[:12]
    lines = [
        f"{row['layer']:<40} {row.get('strategy', ''):<8} floor {row.get('floor_us', 0):>7.0f}  "
        f"dense {row.get('dense_us', 0):>7.0f}  ours {row.get('neq_us', 0):>7.0f}  "
        f"miss {row['miss_us']:>7.0f} us, {row['share_of_miss']:.1%}"
        for row in most
    ]
    return [*lines, str(record.path.with_suffix(".csv"))]


@dataclass(frozen=True)
class _Step:
    """Medians of one variant's step, in seconds; a layer that was not reached is missing."""

    phases: Mapping[str, float]
    layers: Mapping[tuple[str, str], float]

    def of(self, phase: str, layer: str) -> float:
        return self.layers.get((phase, layer), 0.0)


class Account:
    """One cell, built."""

    def __init__(self, workload: Workload, layout: Layout, r: float, options: StepOptions) -> None:
        self._workload, self._batches = workload, workload.batches(layout)
        make = OPTIMIZERS[options.optimizer]
        built = {each.name: each.build(workload.model(layout), make) for each in (DENSE, OURS)}
        self._ours = built[OURS.name][0]
        masks = random_masks(self._ours, r)
        OURS.masks(self._ours, masks, r)
        settle(Variant(OURS.name, self._ours, workload.loss), self._batches, masks)
        self._shares = backward_shares(
            built[DENSE.name][0], self._batches, workload.loss, make, warmup=1, repeats=2
        )
        products = [name for name, layer in named_neuron_layers(self._ours) if not layer.is_norm]
        passed = without_wgrads(workload.model(layout), products)
        learned = [p for p in passed.parameters() if p.requires_grad]
        self._variants = [
            *(Variant(name, model, workload.loss, opt) for name, (model, opt) in built.items()),
            Variant(NO_WGRAD, passed, workload.loss, make(learned) if learned else None),
        ]
        self._strategies = self._chosen(built[DENSE.name][0])

    def rows(self) -> Iterator[Row]:
        """One for each layer, then what no layer owns, then the whole step."""
        steps = self._timed()
        dense, ours, passed = (steps[name] for name in (DENSE.name, OURS.name, NO_WGRAD))
        layers = [self._layer(name, dense, ours, passed) for name in self._names()]
        saved = sum(row["dense_us"] - row["allowed_us"] for row in layers if "allowed_us" in row)
        frozen = frozen_parameters(self._ours)
        misses = [1e6 * (ours.phases[phase] - dense.phases[phase]) for phase in PHASES]
        in_layers = sum(row["miss_us"] for row in layers)
        optimizer = misses[2] + 1e6 * frozen * dense.phases["optimizer"]
        rest = misses[0] + misses[1] + saved - in_layers
        rows: list[Row] = [
            *layers,
            {"layer": "(optimizer)", "miss_us": optimizer},
            {"layer": "(everything else)", "miss_us": rest},
        ]
        whole = in_layers + optimizer + rest
        for row in rows:
            yield row | {"share_of_miss": row["miss_us"] / whole}
        yield {
            "layer": "(whole step)",
            "dense_us": 1e6 * sum(dense.phases.values()),
            "neq_us": 1e6 * sum(ours.phases.values()),
            "miss_us": whole,
            "share_of_miss": 1.0,
            "read_bandwidth": self._shares.read_bandwidth,
            "write_bandwidth": self._shares.write_bandwidth,
        }

    def _layer(self, name: str, dense: _Step, ours: _Step, passed: _Step) -> Row:
        layer = dict(named_neuron_layers(self._ours))[name]
        n, k = layer.channels.n_active, len(layer.channels)
        forward = 1e6 * (ours.of(FORWARD, name) - dense.of(FORWARD, name))
        row: Row = {"layer": name, "active": n, "channels": k, "forward_extra_us": forward}
        if layer.is_norm:
            extra = 1e6 * (ours.of(NODES, name) - dense.of(NODES, name))
            return row | {"kind": "norm", "neq_us": extra, "miss_us": extra + forward}
        dgrad = passed.of(NODES, name)
        dense_us = 1e6 * (dense.of(NODES, name) - dgrad)
        neq_us = 1e6 * (ours.of(NODES, name) - dgrad)
        moved, floor = self._floor(name, layer.channels.mask)
        floor_us = 1e6 * floor
        allowed = min(max(dense_us * n / k, floor_us), dense_us)
        return row | {
            "kind": "product",
            "strategy": self._strategies.get(name, ""),
            **moved,
            "floor_us": floor_us,
            "dense_us": dense_us,
            "allowed_us": allowed,
            "neq_us": neq_us,
            "miss_us": neq_us - allowed + forward,
        }

    def _floor(self, name: str, mask: Tensor) -> tuple[Row, float]:
        """Bytes that the weight gradients of a module have to move, of dY whole cache lines, and
        the seconds that takes."""
        parts = [part for part in self._shares.layers if _is_of(part, name)]
        moved = {
            "input_bytes": sum(part.input_bytes or 0 for part in parts),
            "active_grad_output_bytes": sum(
                part.grad_output_share(mask) * (part.grad_output_bytes or 0) for part in parts
            ),
            "grad_weight_bytes": sum(part.grad_weight_bytes or 0 for part in parts),
        }
        return moved, _seconds(self._shares, **moved)

    def _names(self) -> list[str]:
        """Neuron layers, the first one first; of one in another the outer one."""
        names = [name for name, _ in named_neuron_layers(self._ours)]
        return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]

    def _chosen(self, plain: nn.Module) -> dict[str, str]:
        found = {}
        context = selector.context("cpu")
        layers = dict(named_neuron_layers(self._ours))
        dtype = self._workload.autocast or torch.float32
        for name, problem in problems_of(plain, self._batches[0][0]).items():
            if name in layers:
                n = layers[name].channels.n_active
                choice = selector.choice(problem._replace(dtype=dtype), n, context)
                found[name] = choice.strategy.name.lower()
        return found

    def _timed(self) -> dict[str, _Step]:
        samples: dict[str, Samples] = {v.name: defaultdict(list) for v in self._variants}
        phases = {v.name: PhaseClock() for v in self._variants}
        shuffled = random.Random(0)
        names = self._names()
        for i in range(WARMUP + ROUNDS):
            if i == WARMUP:
                samples = {v.name: defaultdict(list) for v in self._variants}
                phases = {v.name: PhaseClock() for v in self._variants}
            for variant in shuffled.sample(self._variants, len(self._variants)):
                batch = self._batches[i % len(self._batches)]
                with _timing_layers(variant.model, names) as seconds:
                    run_step(variant, batch, phases[variant.name])
                for key, spent in seconds.items():
                    samples[variant.name][key].append(spent)
        return {
            name: _Step(
                {phase: _median(phases[name].samples[phase]) for phase in PHASES},
                {key: _median(spent) for key, spent in samples[name].items()},
            )
            for name in samples
        }


def _is_of(part: LayerShare, name: str) -> bool:
    return part.name == name or part.name.startswith(f"{name}.")


def _seconds(
    shares: StepShares,
    input_bytes: float,
    active_grad_output_bytes: float,
    grad_weight_bytes: float,
) -> float:
    assert shares.read_bandwidth is not None
    assert shares.write_bandwidth is not None
    reads = (input_bytes + active_grad_output_bytes) / shares.read_bandwidth
    return reads + grad_weight_bytes / shares.write_bandwidth


def _median(samples: list[float]) -> float:
    return Quantiles.of(samples).median


@contextmanager
def _timing_layers(model: nn.Module, names: list[str]) -> Iterator[dict[tuple[str, str], float]]:
    """Within it, the seconds of each named module's forward and of its nodes of the backward."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    started: dict[str, float] = {}

    def watch(name: str, module: nn.Module) -> Iterator[Any]:
        def enter(module: nn.Module, args: Any) -> None:
            started[name] = time.perf_counter()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            seconds[FORWARD, name] += time.perf_counter() - started[name]
            output = output[0] if isinstance(output, tuple) else output
            for node in _nodes(output, args):
                _time(node, (NODES, name), seconds)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    with ExitStack() as stack:
        for name in names:
            for handle in watch(name, model.get_submodule(name)):
                stack.callback(handle.remove)
        yield seconds


def _time(node: Any, key: tuple[str, str], seconds: dict[tuple[str, str], float]) -> None:
    begun: list[float] = []

    def begin(grads: Any) -> None:
        begun.append(time.perf_counter())

    def end(grad_inputs: Any, grad_outputs: Any) -> None:
        seconds[key] += time.perf_counter() - begun.pop()

    node.register_prehook(begin)
    node.register_hook(end)


def _nodes(output: Tensor, inputs: tuple[Any, ...]) -> Iterator[Any]:
    """Of autograd, between a module's output and its inputs; not the leaves' accumulation."""
    ends = {t.grad_fn for t in inputs if isinstance(t, Tensor)}
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in ends or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        yield node
        pending.extend(below for below, _ in node.next_functions)
