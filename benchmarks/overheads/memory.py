"""Memory and time of a training step as layers freeze wholly, from the input on.

saved: bytes that autograd keeps for backward, parameters apart. peak: growth of the resident set in
one step (fresh process, after a step on one image). time: forward and backward against the same
model whose frozen prefix runs under torch.no_grad, in turns.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

import neq_kernels as neq
from benchmarks.common import cli
from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import WORKLOADS, Workload, loss
from benchmarks.overheads.peak_memory import NOT_MEASURED, peak_in_child, saved_bytes
from benchmarks.overheads.prefixes import (
    Prefix,
    freeze_neurons,
    freeze_parameters,
    prefixes,
    run_without_grad,
)
from neq_kernels.measure import Variant, step_time

MODELS = ("resnet18", "vit_b_16")
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
QUICK_MODELS = ("resnet18",)
QUICK_FRACTIONS = (0.0, 0.5)
PROVIDERS = ("dense", "requires_grad", "neq")
LAYOUT = "nchw"
# A wholly frozen layer costs what requires_grad_(False) and no_grad cost.
MOST_SAVED, MOST_TIME = 1.01, 1.05
WARMUP, LEAST_ROUNDS, MOST_ROUNDS = 2, 7, 60
MEBI = 2**20
COLUMNS = (
    ("model", -18),
    ("frozen layers", 13),
    ("provider", -13),
    ("saved MiB", 9),
    ("peak MiB", 8),
    ("time / no_grad", 14),
    ("p20-p80", 11),
)


def build(workload: Workload, provider: str, prefix: Prefix) -> tuple[nn.Module, Optimizer]:
    """The model with its prefix frozen the provider's way, and SGD."""
    model = workload.model(LAYOUT)
    if provider == "requires_grad":
        freeze_parameters(model, prefix)
    if provider == "neq":
        neq.convert(model, others="follow")
        freeze_neurons(model, prefix)
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    if provider == "neq":
        neq.attach(optimizer, model)
    return model, optimizer


def one_step(workload: Workload, provider: str, prefix: Prefix) -> Callable[[], Any]:
    """A training step, ready to run: libraries loaded and optimizer state made by a step on two
    images."""
    model, optimizer = build(workload, provider, prefix)
    batch = workload.batches(LAYOUT, 1)[0]

    def run(images: int) -> None:
        loss(model, (batch[0][:images], batch[1][:images])).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run(2)
    return lambda: run(workload.images)


def time_ratio(workload: Workload, prefix: Prefix, seconds: float) -> Row:
    """Forward and backward with the prefix frozen, over the same with the prefix in no_grad."""
    ours, _ = build(workload, "neq", prefix)
    plain = workload.model(LAYOUT)
    run_without_grad(plain, prefix)
    variants = [Variant("neq", ours, loss), Variant("no_grad", plain, loss)]
    batches = workload.batches(LAYOUT)
    pilot = step_time(variants, batches, warmup=1, repeats=1)
    rounds = round(seconds / sum(variant.total[0] for variant in pilot.variants))
    repeats = min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)
    times = step_time(variants, batches, warmup=WARMUP, repeats=repeats)
    ratio = asdict(times.speedup("no_grad", over="neq"))
    row: Row = {f"time_ratio_{level}": value for level, value in ratio.items()}
    for name in ("neq", "no_grad"):
        row[f"{name}_seconds_median"] = times[name].quantiles().median
    return row | {"rounds": repeats}


def rows(workload: Workload, fraction: float, prefix: Prefix, seconds: float) -> list[Row]:
    """One for each provider; the dense one only where nothing is frozen, as nothing changes it."""
    found: dict[str, Row] = {}
    batch = workload.batches(LAYOUT, 1)[0]
    for provider in PROVIDERS[1:] if prefix.layers else PROVIDERS:
        model, _ = build(workload, provider, prefix)
        found[provider] = {
            "model": workload.name,
            "fraction": fraction,
            "frozen_layers": len(prefix.layers),
            "layers": prefix.of,
            "prefix_end": prefix.end,
            "provider": provider,
            "saved_bytes": saved_bytes(model, lambda model=model: loss(model, batch)),
            "peak_bytes": peak_in_child(one_step, workload, provider, prefix),
        }
        del model
        gc.collect()
    ours, by_hand = found["neq"], found["requires_grad"]["saved_bytes"]
    ours["passes_saved"] = ours["saved_bytes"] <= MOST_SAVED * by_hand
    if prefix.layers:
        ours |= time_ratio(workload, prefix, seconds)
        ours["passes_time"] = ours["time_ratio_median"] <= MOST_TIME
        gc.collect()
    return list(found.values())


def show(table: cli.Table, row: Row) -> None:
    peak = row["peak_bytes"]
    cells = [
        row["model"],
        f"{row['frozen_layers']} of {row['layers']}",
        row["provider"],
        f"{row['saved_bytes'] / MEBI:.1f}",
        "" if peak is None else f"{peak / MEBI:.0f}",
        f"{row['time_ratio_median']:.3f}" if "time_ratio_median" in row else "",
        f"{row['time_ratio_p20']:.2f}-{row['time_ratio_p80']:.2f}" if "rounds" in row else "",
    ]
    verdicts = [
        cli.verdict(row.get("passes_saved"), f"saved (<= {MOST_SAVED} x requires_grad)"),
        cli.verdict(row.get("passes_time"), f"time (<= {MOST_TIME})"),
    ]
    table.line(cells, ", ".join(filter(None, verdicts)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    cli.add_common_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: both")
    parser.add_argument("--seconds", type=cli.seconds, help="for each time (4, quick: 2)")
    given = parser.parse_args(arguments)
    cli.prepare(given)
    names = given.models or (QUICK_MODELS if given.quick else MODELS)
    fractions = QUICK_FRACTIONS if given.quick else FRACTIONS
    seconds = given.seconds or (2.0 if given.quick else 4.0)
    settings = {
        "models": list(names),
        "fractions": list(fractions),
        "seconds": seconds,
        "layout": LAYOUT,
        "optimizer": "SGD, momentum 0.9, weight decay 5e-4",
        "targets": {"saved over requires_grad": MOST_SAVED, "time over no_grad": MOST_TIME},
    }
    try:
        record = Record(given.out, "memory", settings)
    except OSError as error:
        return cli.user_error(error)
    with record:
        table = cli.Table(COLUMNS)
        for name in names:
            workload = WORKLOADS[name]
            for fraction, prefix in zip(fractions, prefixes(workload, fractions), strict=True):
                for row in rows(workload, fraction, prefix, seconds):
                    record.add(row)
                    show(table, row)
    if any(row["peak_bytes"] is None for row in record.rows):
        print(NOT_MEASURED)
    print(record.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
