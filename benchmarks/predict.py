"""What freezing is predicted to save of a whole training step on GPUs. Nothing here is timed, and
no GPU is needed.

>>> python -m benchmarks.predict                                  # every model on A100 and H100
>>> python -m benchmarks.predict --out runs/bench --publish       # only the table and the picture

Products of matrices (linear layers, and convolutions as implicit GEMM; forward, input gradient,
weight gradient) take what NVIDIA's package ``nvidia-matmul-heuristics`` predicts for the best of
its kernels. All other operations of the forward and backward, grouped convolutions, the optimizer
(SGD with momentum), packing, scattering and zeros are counted in bytes at the memory bandwidth of
the data sheet, operation by operation; attention is taken to be fused. Everything has 16 bits.

Not counted: Python, the launches of operations that are no product, bias gradients of
convolutions, data loading, the controller, communication. The share ``r`` of the channels of every
layer is active, chosen at random. The strategy of each layer is the one that the library chooses on
a GPU with ``NEQ_KERNELS_BACKEND=triton``; its own kernels are taken to be as good as the package
expects Triton's to be.

Each prediction is made twice. ``optimistic``: the taps of a convolution find its operands in a
cache, and kernels that only frozen neurons need start for free. ``pessimistic``: every tap reads
memory, and each such kernel costs the fixed time that the package counts for a product.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import neq_kernels as neq
from benchmarks import console, matmul_predictor
from benchmarks.cases import CASES, Case, Layout, random_masks, set_masks
from benchmarks.matmul_predictor import Answers, Gemm
from benchmarks.predict_page import NOTICE, publish
from benchmarks.predicted_step import (
    ASSUMPTIONS,
    GPUS,
    Choice,
    PredictedStep,
    best_choice,
    needed_gemms,
    own_choice,
)
from benchmarks.record import Record, Row
from benchmarks.step_work import DTYPES, StepWork, meta_model, step_work
from neq_kernels.measure import bound, flops
from neq_kernels.measure import frozen_parameter_fraction as frozen_parameters
from neq_kernels.measure.flops import FlopCount
from neq_kernels.problem import Strategy

SHARES_OF_CHANNELS = (1.0, 0.5, 0.25, 0.1, 0.02)
# A batch for one GPU: images, and their size where it is not the one of the case.
BATCHES: dict[str, tuple[int, int | None]] = {
    "resnet32": (1024, None),
    "resnet18": (256, 224),
    "resnet50": (256, 224),
    "mobilenet_v3_small": (256, 224),
    "convnext_tiny": (128, 224),
    "vit_b_16": (128, 224),
    "mlp": (8192, None),
}
COLUMNS = (
    ("model", -18),
    ("GPU", -4),
    ("assumptions", -11),
    ("r", 4),
    ("predicted dense ms", 18),
    ("predicted ms", 12),
    ("predicted speed-up", 18),
    ("best strategies, predicted", 26),
    ("predicted bound", 15),
    ("predicted with floor", 20),
)
Ask = Callable[[str, str, Iterable[Gemm]], Answers]


def case_for_gpu(name: str) -> tuple[Case, Layout]:
    """A network with a batch that fills a GPU, and the layout that is fastest there."""
    case, (images, size) = CASES[name], BATCHES[name]
    case = replace(case, images=images)
    if size is not None:
        case = replace(case, shape=(case.shape[0], size, size), options={})
    return case, "nhwc" if "nhwc" in case.layouts else case.layouts[0]


def rows(
    case: Case,
    layout: Layout,
    gpus: Sequence[str],
    shares: Sequence[float],
    dtype: str,
    ask: Ask,
) -> Iterator[Row]:
    """The predictions for one model."""
    model, x = meta_model(case, layout, dtype)
    work = step_work(model, x)
    neq.convert(model, others="follow")
    masked: dict[float, tuple[FlopCount, float]] = {}
    for r in shares:
        set_masks(model, random_masks(model, r))
        masked[r] = flops.count(model, x[:1]), frozen_parameters(model)
    active: dict[str, set[int]] = {layer.name: set() for layer in work.layers}
    for counted, _ in masked.values():
        for name, n in _active(counted).items():
            active[name].add(n)
    about = {"model": case.name, "images": case.images, "layout": layout, "dtype": dtype}
    for gpu in gpus:
        answers = ask(GPUS[gpu].name, dtype, needed_gemms(work, active))
        for name, assumptions in ASSUMPTIONS.items():
            step = PredictedStep(GPUS[gpu], work, answers, assumptions)
            for r, (counted, frozen) in masked.items():
                row = about | {"gpu": gpu, "assumptions": name, "r": r}
                yield row | predicted(step, work, counted, frozen)


def predicted(step: PredictedStep, work: StepWork, now: FlopCount, frozen: float) -> Row:
    """One prediction; ``now`` counts the masked model, ``frozen`` is its share of parameters."""
    active = _active(now)

    def chosen(choose: Choice) -> dict[str, Strategy]:
        return {
            layer.name: Strategy.DENSE
            if active[layer.name] == layer.problem.neurons
            else choose(step, layer, active[layer.name])
            for layer in work.layers
        }

    def wgrads(strategies: dict[str, Strategy]) -> dict[str, float]:
        return {
            layer.name: step.wgrad(layer, active[layer.name], strategies[layer.name]).seconds
            for layer in work.layers
        }

    own = chosen(own_choice)
    seconds = wgrads(own)
    masked = step.seconds(seconds, frozen)
    best = step.seconds(wgrads(chosen(best_choice)), frozen)
    shares = step.shares()
    count = Counter(strategy.name.lower() for strategy in own.values())
    return {
        "predicted_dense_step_seconds": step.dense,
        "predicted_step_seconds": masked,
        "predicted_speedup": step.dense / masked,
        "predicted_speedup_best_strategies": step.dense / best,
        "predicted_bound": bound(shares, now, frozen),
        "predicted_bound_floor": bound(shares, now, frozen, floor=True),
        "predicted_forward_share": shares.forward,
        "predicted_dgrad_share": step.dgrad / step.dense,
        "predicted_wgrad_share": shares.wgrad,
        "predicted_optimizer_share": shares.optimizer,
        "predicted_mask_bytes": sum(
            step.wgrad(layer, active[layer.name], own[layer.name]).mask_bytes
            for layer in work.layers
        ),
        "predicted_layers_slower_than_dense": sum(
            seconds[name] > dense for name, dense in step.wgrads.items()
        ),
        **{f"predicted_layers_{s.name.lower()}": count[s.name.lower()] for s in Strategy},
    }


def _active(counted: FlopCount) -> dict[str, int]:
    return {layer.name: layer.active for layer in counted.layers if layer.kind != "norm"}


def show(table: console.Table, row: Row) -> None:
    table.line(
        [
            row["model"],
            row["gpu"],
            row["assumptions"],
            f"{row['r']:g}",
            f"{1e3 * row['predicted_dense_step_seconds']:.2f}",
            f"{1e3 * row['predicted_step_seconds']:.2f}",
            f"{row['predicted_speedup']:.3f}",
            f"{row['predicted_speedup_best_strategies']:.3f}",
            f"{row['predicted_bound']:.3f}",
            f"{row['predicted_bound_floor']:.3f}",
        ]
    )


def _share(text: str) -> float:
    value = console.share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a share above 0, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument(
        "--models", nargs="+", choices=BATCHES, metavar="MODEL", help=", ".join(BATCHES)
    )
    parser.add_argument("--gpus", nargs="+", choices=GPUS, help="default: all")
    parser.add_argument("--r", nargs="+", type=_share, help="shares of active channels")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--publish", action="store_true", help="predict nothing, write the page")
    given = parser.parse_args(arguments)
    try:
        if given.publish:
            print("\n".join(map(str, publish(given.out))))
        else:
            run(given)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return console.USER_ERROR
    return 0


def run(given: argparse.Namespace) -> None:
    """Predict, print and write what the arguments ask for.

    Raises:
        RuntimeError: the package is missing, or fails.
    """
    missing = matmul_predictor.unavailable()
    if missing is not None:
        raise RuntimeError(missing)
    names, gpus = given.models or list(BATCHES), given.gpus or list(GPUS)
    shares = tuple(given.r or SHARES_OF_CHANNELS)
    by = matmul_predictor.version()
    settings: dict[str, Any] = {
        "notice": NOTICE,
        "gpus": {name: asdict(GPUS[name]) for name in gpus},
        "assumptions": {name: asdict(each) for name, each in ASSUMPTIONS.items()},
    }
    print(NOTICE)
    table = console.Table(COLUMNS)
    with Record(given.out, "predict", settings) as record:
        for name in names:
            for row in rows(*case_for_gpu(name), gpus, shares, given.dtype, matmul_predictor.ask):
                record.add(row | {"predicted_by": by})
                show(table, row)
    print(NOTICE)
    print(record.path)


if __name__ == "__main__":
    sys.exit(main())
