"""What the controller costs: time of NEqController.step() against an epoch, and memory.

ResNet-32 for CIFAR-10, a probe of 50 random images in one batch. An epoch is 391 times the median
measured dense step: 50,000 images in batches of 128. Memory of step(): what PyTorch's CPU allocator
holds at the most, against one copy of parameters and buffers and the outputs of every converted
layer for the probe, which is what one φ needs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

import neq_kernels as neq
from benchmarks.common import cli
from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import SEED, WORKLOADS, Layout, Workload, loss
from benchmarks.overheads.peak_memory import peak_allocated
from neq_kernels.layers.traversal import named_neuron_layers
from neq_kernels.measure import PhaseClock, Variant
from neq_kernels.measure.timing import PHASES, Quantiles, run_step

MODEL = "resnet32"
EPOCH_IMAGES = 50_000
PROBE_IMAGES = 50
MOST_TIME = 0.01
MOST_MEMORY = 1.1
WARMUP, ROUNDS, QUICK_ROUNDS = 2, 15, 3
DRIFT = 1e-3
MEBI = 2**20
COLUMNS = (
    ("layout", -6),
    ("step ms", 8),
    ("controller ms", 13),
    ("p20-p80", 11),
    ("of epoch", 9),
    ("model MiB", 9),
    ("outputs MiB", 11),
    ("kept MiB", 8),
    ("peak MiB", 8),
    ("of both", 8),
)


def measure(workload: Workload, layout: Layout, rounds: int) -> Row:
    """Training steps and controller steps in turns; then the memory of one more."""
    model = workload.model(layout)
    variant = Variant(
        "dense", model, loss, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    )
    watched = neq.convert(workload.model(layout))
    probe = workload.batches(layout, 1)[0][0][:PROBE_IMAGES]
    controller = neq.NEqController(watched, [probe])
    batches = workload.batches(layout)
    for i in range(WARMUP + rounds):
        if i in (0, WARMUP):
            clock = PhaseClock()
        run_step(variant, batches[i % len(batches)], clock)
        _drift(watched)
        with clock.phase("controller"):
            controller.step()
    _drift(watched)
    peak = peak_allocated(controller.step)
    return {
        "model": workload.name,
        "layout": layout,
        "rounds": rounds,
        "probe_images": len(probe),
        **_time(clock, math.ceil(EPOCH_IMAGES / workload.images)),
        **_memory(watched, probe, _bytes(controller.state_dict()["memory"].values()), peak),
    }


def _time(clock: PhaseClock, steps: int) -> Row:
    step = Quantiles.of([sum(s) for s in zip(*(clock.samples[p] for p in PHASES), strict=True)])
    controller = Quantiles.of(clock.samples["controller"])
    epoch = steps * step.median
    return {
        "step_seconds_median": step.median,
        "epoch": f"{steps} x the median step",
        "epoch_seconds": epoch,
        **{f"controller_seconds_{level}": value for level, value in asdict(controller).items()},
        "share_of_epoch": controller.median / epoch,
        "passes_time": controller.median / epoch <= MOST_TIME,
    }


def _memory(model: nn.Module, probe: Tensor, kept: int, peak: int) -> Row:
    copy, outputs = _bytes([*model.parameters(), *model.buffers()]), output_bytes(model, probe)
    ratio = (kept + peak) / (copy + outputs)
    return {
        "model_bytes": copy,
        "output_bytes": outputs,
        "kept_bytes": kept,
        "peak_step_bytes": peak,
        "memory_ratio": ratio,
        "passes_memory": ratio <= MOST_MEMORY,
    }


def output_bytes(model: nn.Module, batch: Tensor) -> int:
    """Bytes of the outputs of every converted layer in one forward."""
    outputs: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.nbytes))
        for _, layer in named_neuron_layers(model)
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return sum(outputs)


def show(table: cli.Table, row: Row) -> None:
    in_mebi = ("model_bytes", "output_bytes", "kept_bytes", "peak_step_bytes")
    p20, median, p80 = (1e3 * row[f"controller_seconds_{q}"] for q in ("p20", "median", "p80"))
    table.line(
        [
            row["layout"],
            f"{1e3 * row['step_seconds_median']:.1f}",
            f"{median:.1f}",
            f"{p20:.0f}-{p80:.0f}",
            f"{row['share_of_epoch']:.3%}",
            *(f"{row[name] / MEBI:.1f}" for name in in_mebi),
            f"{row['memory_ratio']:.2f}",
        ],
        f"{cli.verdict(row['passes_time'], f'time (<= {MOST_TIME:.0%} of an epoch)')}, "
        f"{cli.verdict(row['passes_memory'], f'memory (<= {MOST_MEMORY} x model + outputs)')}",
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _drift(model: nn.Module) -> None:
    """As if an epoch of training had passed: φ is not exactly 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=DRIFT)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    cli.add_common_arguments(parser)
    parser.add_argument("--rounds", type=cli.positive, help=f"{ROUNDS} (quick: {QUICK_ROUNDS})")
    given = parser.parse_args(arguments)
    cli.prepare(given)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks otherwise
    torch.manual_seed(SEED)
    workload = WORKLOADS[MODEL]
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    settings = {
        "rounds": rounds,
        "probe_images": PROBE_IMAGES,
        "epoch": f"{EPOCH_IMAGES} images in batches of {workload.images}",
        "targets": {"share of an epoch": MOST_TIME, "memory": MOST_MEMORY},
    }
    try:
        record = Record(given.out, "controller", settings)
    except OSError as error:
        return cli.user_error(error)
    with record:
        table = cli.Table(COLUMNS)
        for layout in workload.layouts[:1] if given.quick else workload.layouts:
            row = measure(workload, layout, rounds)
            record.add(row)
            show(table, row)
    print(record.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
