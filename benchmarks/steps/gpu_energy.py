"""Joules of a training step on a GPU, dense and ours, from the GPU's own counter or not at all.

>>> python -m benchmarks.steps.gpu_energy --seconds 60 --out runs/gpu

Windows of seconds, of dense steps and of ours in turn: the counter is refreshed up to ten times a
second. Steps follow each other as in training, without a wait for the device.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.common import cli, gpu_device
from benchmarks.common.deadline import Deadline
from benchmarks.common.gpu_device import OUT_OF_MEMORY, DeviceLost, Lab
from benchmarks.common.interrupt import Interrupted, Interruptible
from benchmarks.common.records import Record, Row
from benchmarks.common.workloads import GPU_WORKLOADS, Workload, random_masks
from benchmarks.steps import comparison
from benchmarks.steps.correctness import differences
from neq_kernels.dispatch.selection import selector
from neq_kernels.measure import EnergyMeter, Variant
from neq_kernels.measure.energy import NO_COUNTER, EnergyReading
from neq_kernels.measure.timing import Quantiles

NAME = "gpu_energy"
SHARES = (0.1, 0.5)
WARMUP = 3
# What reads the GPU; of a processor's counters nothing is asked here.
COUNTER = "NVML"


@dataclass(frozen=True)
class EnergyOptions:
    """``windows`` of so many ``seconds`` each for dense and for ours; backends in ``failed`` are
    not measured."""

    shares: tuple[float, ...] = SHARES
    seconds: float = 3.0
    windows: int = 3
    failed: tuple[str, ...] = ()


def joules(reading: EnergyReading) -> float | None:
    """Of the GPUs in a window; None if one was not counted."""
    parts = [device.joules for device in reading.devices if device.name.startswith(COUNTER)]
    counted = [part for part in parts if part is not None]
    return sum(counted) if counted and len(counted) == len(parts) else None


def measure(
    workload: Workload, r: float, options: EnergyOptions, meter: EnergyMeter
) -> Iterator[Row]:
    """One row for dense and one for ours."""
    layout = workload.layouts[0]
    about: Row = {"model": workload.name, "layout": layout, "r": r}
    make = comparison.OPTIMIZERS["sgd"]
    providers = (comparison.DENSE, comparison.OURS)
    built = {each.name: each.build(workload.model(layout), make) for each in providers}
    masks = random_masks(built[comparison.OURS.name][0], r)
    for provider in providers:
        provider.masks(built[provider.name][0], masks, r)
    batches = workload.batches(layout)
    models = {name: model for name, (model, _) in built.items()}
    wrong = differences(
        models, masks, batches[0], workload.loss, tolerance=comparison.tolerance_of(workload)
    )
    if wrong:
        yield from (about | {"provider": name, "error": text} for name, text in wrong.items())
        return
    variants = [Variant(name, model, workload.loss, opt) for name, (model, opt) in built.items()]
    steps = {v.name: _steps_of_a_window(v, batches, options.seconds, meter) for v in variants}
    windows: dict[str, list[EnergyReading]] = {variant.name: [] for variant in variants}
    for _ in range(options.windows):
        for variant in variants:
            windows[variant.name].append(_window(variant, batches, steps[variant.name], meter))
    per_step: dict[str, list[float]] = {}
    for name, readings in windows.items():
        counted = [joules(reading) for reading in readings]
        row = about | {"provider": name, "source": readings[0].source, "steps": steps[name]}
        if any(value is None for value in counted):
            lost = next(r.source for r, value in zip(readings, counted, strict=True) if not value)
            yield row | {"error": lost}
            continue
        per_step[name] = [value / steps[name] for value in counted if value is not None]
        seconds = sum(reading.seconds for reading in readings)
        row |= comparison.flat("joules_per_step", Quantiles.of(per_step[name]))
        row["watts"] = sum(per_step[name]) * steps[name] / seconds
        row["seconds_per_step"] = seconds / steps[name] / len(readings)
        if name != comparison.DENSE.name and comparison.DENSE.name in per_step:
            pairs = zip(per_step[comparison.DENSE.name], per_step[name], strict=True)
            row |= comparison.flat(
                "over_dense", Quantiles.of([dense / ours for dense, ours in pairs])
            )
        yield row


def _window(
    variant: Variant, batches: Sequence[object], steps: int, meter: EnergyMeter
) -> EnergyReading:
    with meter:
        for i in range(steps):
            variant.loss(variant.model, batches[i % len(batches)]).backward()
            assert variant.optimizer is not None
            variant.optimizer.step()
            variant.model.zero_grad(set_to_none=True)
    return meter.reading


def _steps_of_a_window(
    variant: Variant, batches: Sequence[object], seconds: float, meter: EnergyMeter
) -> int:
    _window(variant, batches, WARMUP, meter)
    trial = _window(variant, batches, WARMUP, meter)
    return max(WARMUP, math.ceil(seconds * WARMUP / trial.seconds))


def run(
    workloads: Sequence[Workload],
    options: EnergyOptions,
    lab: Lab,
    meter: EnergyMeter,
    deadline: Deadline,
    record: Record,
) -> bool:
    """Measure, print and write; whether every gradient was right."""
    if not any(name.startswith(COUNTER) for name in meter.counters):
        reasons = "; ".join(str(missing) for missing in meter.missing)
        record.add({"no_counter": NO_COUNTER, "reasons": reasons})
        print(f"{NO_COUNTER} ({reasons})")
        return True
    if lab.backend in options.failed:
        record.add({"error": f"not measured: tests of {lab.backend} failed"})
        return False
    right = True
    with Interruptible() as stop, selector.forced_backend(lab.backend):
        for r in options.shares:
            for workload in workloads:
                for row in _rows(workload, r, options, lab, meter, deadline, stop.check):
                    row = {"backend": lab.backend, **row}
                    record.add(row)
                    right &= row.get("error", OUT_OF_MEMORY) == OUT_OF_MEMORY
                    print(_line(row), flush=True)
                gc.collect()
                lab.free()
    return right


def _rows(
    workload: Workload,
    r: float,
    options: EnergyOptions,
    lab: Lab,
    meter: EnergyMeter,
    deadline: Deadline,
    check: Callable[[], None],
) -> Iterator[Row]:
    check()
    about: Row = {"model": workload.name, "layout": workload.layouts[0], "r": r}
    # Begun only if it fits: windows cannot be made shorter.
    if deadline.left < 2 * options.windows * options.seconds:
        yield about | {"left_out": True}
        return
    try:
        yield from measure(workload, r, options, meter)
    except DeviceLost:
        raise
    except Exception as failure:  # a model that does not fit is no reason to lose the others
        yield about | {"error": lab.survived(failure)}


def _line(row: Row) -> str:
    head = f"{row['model']:<12} r={row['r']:<5g} {row.get('provider', ''):<6}"
    if "left_out" in row:
        return f"{head} no time left"
    if "error" in row:
        return f"{head} {cli.red(row['error'])}"
    text = f"{head} {row['joules_per_step_median']:8.3f} J/step {row['watts']:6.0f} W"
    if "over_dense_median" in row:
        text += f"  {row['over_dense_median']:.3f} times less than dense"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    given = gpu_device.phase_parser(__spec__, __doc__, 60.0).parse_args(arguments)
    deadline = Deadline.after(given.seconds)
    if not gpu_device.found():
        return gpu_device.nothing_measured()
    lab = Lab.on_gpu()
    options = EnergyOptions(failed=tuple(given.failed))
    meter = EnergyMeter(gpus=None if lab.number is None else [lab.number])
    try:
        with Record(given.out, NAME, asdict(options)) as record:
            right = run(GPU_WORKLOADS, options, lab, meter, deadline, record)
    except (OSError, Interrupted, DeviceLost) as error:
        return gpu_device.exit_code(NAME, error)
    return 0 if right else cli.WRONG_RESULT


if __name__ == "__main__":
    sys.exit(main())
