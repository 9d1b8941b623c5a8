"""Every Triton kernel, compiled for GPUs that are not there: what the compiler made of it.

Nothing is timed. A kernel fails that spills registers, of which not one program fits on a
multiprocessor, or that multiplies matrices without a tensor core; the main loop's share of
tensor-core instructions stands beside that of a plain dense product of the same tile, and a product
fails that does not gather as it multiplies and has less than nine tenths of it. (One whose operand
is gathered has more to do in its main loop.) Occupancy: the share of a multiprocessor's warps that
can be resident.

>>> python -m benchmarks.targets
>>> python -m benchmarks.targets --targets sm_90 --publish    # the table of benchmarks/results
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks import console
from benchmarks.ahead_of_time import TARGETS, Compiled, Launch, compile_for, recorded
from benchmarks.dense_product import product
from benchmarks.occupancy import occupancy
from benchmarks.record import Record, Row
from neq_kernels.backends.triton import conv_wgrad, linear_wgrad, row_steps, tiles
from neq_kernels.backends.triton.depthwise_wgrad import depthwise_wgrad
from neq_kernels.backends.triton.gather import gather, scatter
from neq_kernels.backends.triton.similarity import channel_similarity
from neq_kernels.backends.triton.tiles import Tiles
from neq_kernels.problem import ConvGeometry

RESULTS = Path(__file__).parent / "results" / "targets.csv"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Active channels: one tile of rows each way that tiles are chosen.
ACTIVE = (8, 32, 64, 512)
# Whether there is a momentum buffer, whether steps are counted (a first one is not dampened), and
# Nesterov's momentum. All other settings of the optimizers, AdamW's decay among them, are numbers
# that the same kernels take; what becomes of frozen neurons' state is not the kernels' concern.
SGD = {
    "sgd": (False, False, False),
    "sgd momentum": (True, False, False),
    "sgd nesterov": (True, False, True),
    "sgd dampened": (True, True, False),
    "sgd counted nesterov": (True, True, True),
}
ADAM = {"adam": False, "adam amsgrad": True}
PRODUCTS = ("wgrad_kernel", "product_kernel")
# Of the dense product's share of tensor-core instructions, for what does not gather as it
# multiplies.
LEAST_SHARE = 0.9
COLUMNS = (
    ("kernel", -34),
    ("case", -26),
    ("tile", -28),
    ("dtype", -8),
    ("target", -8),
    ("registers", 9),
    ("spills", 6),
    ("shared", 6),
    ("occupancy", 9),
    ("loop", 5),
    ("tensor", 6),
    ("dense", 6),
)


@dataclass(frozen=True)
class Case:
    """A call whose launches are compiled."""

    name: str
    dtype: torch.dtype
    call: Callable[[], object]
    multiplies: bool = False


def cases() -> Iterator[Case]:
    """All kernels, with every dtype."""
    for dtype in DTYPES:
        for n in ACTIVE:
            for splits in (1, 8):
                yield Case(
                    f"linear n={n} splits={splits}",
                    dtype,
                    lambda n=n, dtype=dtype, splits=splits: _linear(n, dtype, splits),
                    multiplies=True,
                )
            for layout in (torch.contiguous_format, torch.channels_last):
                name = "nhwc" if layout == torch.channels_last else "nchw"
                yield Case(
                    f"conv {name} n={n}",
                    dtype,
                    lambda n=n, dtype=dtype, layout=layout: _conv(n, dtype, layout),
                    multiplies=True,
                )
        for layout in (torch.contiguous_format, torch.channels_last):
            name = "nhwc" if layout == torch.channels_last else "nchw"
            yield Case(f"depthwise {name}", dtype, lambda d=dtype, m=layout: _depthwise(d, m))
            yield Case(f"similarity {name}", dtype, lambda d=dtype, m=layout: _similarity(d, m))
        for transposed in (False, True):
            name = "gather transposed" if transposed else "gather"
            yield Case(name, dtype, lambda d=dtype, t=transposed: _gather(d, t))
        yield Case("scatter", dtype, lambda dtype=dtype: _scatter(dtype))
        for name, flags in SGD.items():
            yield Case(name, dtype, lambda dtype=dtype, flags=flags: _sgd(dtype, *flags))
        for name, amsgrad in ADAM.items():
            yield Case(name, dtype, lambda d=dtype, amsgrad=amsgrad: _adam(d, amsgrad))


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _selection(k: int) -> tuple[Tensor, Tensor]:
    return _meta(k, dtype=torch.int64), _meta(1, dtype=torch.int32)


def _linear(n: int, dtype: torch.dtype, splits: int) -> None:
    dy, x, weight = (_meta(*s, dtype=dtype) for s in ((4096, 1024), (4096, 1024), (1024, 1024)))
    linear_wgrad.linear_wgrad(dy, x, weight, *_selection(1024), n, True, splits=splits)


def _images(dtype: torch.dtype, layout: torch.memory_format, *shape: int) -> Tensor:
    return _meta(*shape, dtype=dtype).contiguous(memory_format=layout)


def _conv(n: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    dy, x = (_images(dtype, layout, 16, 512, 28, 28) for _ in range(2))
    weight = _images(dtype, layout, 512, 512, 3, 3)
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    conv_wgrad.conv_wgrad(dy, x, weight, geometry, *_selection(512), n, True)


def _depthwise(dtype: torch.dtype, layout: torch.memory_format) -> None:
    dy, x = (_images(dtype, layout, 16, 256, 28, 28) for _ in range(2))
    weight = _images(dtype, layout, 256, 1, 3, 3)
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 256)
    depthwise_wgrad(dy, x, weight, geometry, *_selection(256), 64, True)


def _similarity(dtype: torch.dtype, layout: torch.memory_format) -> None:
    channel_similarity(*(_images(dtype, layout, 64, 256, 28, 28) for _ in range(2)), 1)


def _gather(dtype: torch.dtype, transposed: bool) -> None:
    gather(
        _meta(4096, 1024, dtype=dtype), *_selection(1024), 256, transposed=transposed, summed=True
    )


def _scatter(dtype: torch.dtype) -> None:
    rows, out = _meta(256, 1024, dtype=dtype), _meta(1024, 1024, dtype=dtype)
    scatter(rows, out, *_selection(1024))


def _sgd(dtype: torch.dtype, momentum: bool, counted: bool, nesterov: bool) -> None:
    weight, steps = _meta(1024, 1024, dtype=dtype), _meta(1024, dtype=torch.int64)
    row_steps.sgd_rows_(
        [weight],
        [weight],
        [weight] if momentum else [],
        [steps] if counted else [],
        [_selection(1024)[0]],
        [256],
        (1, 1, 1024, 1024),
        lr=0.1,
        momentum=0.9 if momentum else 0.0,
        dampening=0.1 if counted else 0.0,
        weight_decay=0.1,
        nesterov=nesterov,
        maximize=False,
    )


def _adam(dtype: torch.dtype, amsgrad: bool) -> None:
    weight, steps = _meta(1024, 1024, dtype=dtype), _meta(1024, dtype=torch.int64)
    row_steps.adam_rows_(
        [weight],
        [weight],
        [weight],
        [weight],
        [weight] if amsgrad else [],
        [steps],
        [_selection(1024)[0]],
        [256],
        (1, 1, 1024, 1024),
        lr=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        decoupled=True,
        maximize=False,
    )


def _launches(case: Case, target: str) -> Iterator[Launch]:
    """With the tiles and the precision for this target: first those that are taken by rule, then
    all that tuning tries."""
    way, ways = 0, 1

    def choose(*arguments: Any, **more: Any) -> tuple[Tiles, ...]:
        nonlocal ways
        found = tiles.choices(*arguments, **more)
        ways = len(found)
        return found[way:]

    with ExitStack() as stack:
        for module in (linear_wgrad, conv_wgrad):
            stack.enter_context(mock.patch.object(module, "architecture", return_value=target))
            stack.enter_context(mock.patch.object(module, "choices", choose))
        while way < ways:
            with recorded() as launches:
                case.call()
            yield from launches
            way += 1


def rows(targets: Sequence[str]) -> Iterator[Row]:
    """One row per kernel, case and target; the same compilation appears once."""
    seen: set[tuple[str, ...]] = set()
    for case in cases():
        for target in targets:
            for launch in _launches(case, target):
                key = (target, str(launch))
                if key not in seen:
                    seen.add(key)
                    yield _row(case, launch, target)


def _row(case: Case, launch: Launch, target: str) -> Row:
    about: Row = {
        "kernel": f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.name}",
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "target": target,
        "triton": triton.__version__,
    }
    try:
        compiled = compile_for(launch, TARGETS[target])
    except Exception as error:  # whatever the compiler has to say belongs into the table
        return about | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    if not case.multiplies or launch.name not in PRODUCTS:
        return about | judged(compiled, target)
    tile = _tiles_of(launch)
    plain = _dense(tile, case.dtype, launch.arguments.get("PRECISION", "ieee"), target)
    words = [f"{tile.block_n}x{tile.block_c}x{tile.block_t}", f"{tile.stages} stages"]
    about["tile"] = " ".join(words + ["packed"] * tile.packed)
    least = LEAST_SHARE if tile.packed else 0.0
    return about | judged(compiled, target, plain, least)


def judged(
    compiled: Compiled, target: str, plain: Compiled | None = None, least_share: float = 0.0
) -> Row:
    """What the compiler made of a kernel, and what of it fails.

    Args:
        plain: of a product of matrices: a dense one of the same tile.
        least_share: of the dense product's share of tensor-core instructions in the main loop.
    """
    resident = occupancy(target, compiled.registers, compiled.shared, compiled.warps)
    row = asdict(compiled) | {"occupancy": resident}
    fails = []
    if compiled.spills:
        fails.append("spills")
    if not resident:
        fails.append("does not fit")
    if plain is not None:
        row["share"] = compiled.tensor_core / max(1, compiled.loop)
        row["dense_share"] = plain.tensor_core / max(1, plain.loop)
        if plain.tensor_core and not compiled.tensor_core:
            fails.append("no tensor core")
        elif row["share"] < least_share * row["dense_share"]:
            fails.append("slow main loop")
    return row | {"fails": ", ".join(fails)}


def _tiles_of(launch: Launch) -> Tiles:
    sizes = {name: v for name, v in launch.arguments.items() if name.startswith("BLOCK_")}
    block_t = sizes["BLOCK_T"] if "BLOCK_T" in sizes else sizes["BLOCK_P"] * sizes["BLOCK_Q"]
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    is_packed = launch.name == "product_kernel"
    return Tiles(sizes["BLOCK_N"], sizes["BLOCK_C"], block_t, warps, stages, is_packed)


@functools.cache
def _dense(tiles: Tiles, dtype: torch.dtype, how: str, target: str) -> Compiled:
    with recorded() as launches:
        product(*(_meta(4096, 1024, dtype=dtype) for _ in range(2)), tiles, how)
    return compile_for(launches[0], TARGETS[target])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument("--publish", action="store_true", help=f"copy the table to {RESULTS.name}")
    args = parser.parse_args(arguments)
    table = console.Table(COLUMNS)
    settings = {"targets": args.targets}
    with Record(args.out, "targets", settings) as record:
        for row in rows(args.targets):
            record.add(row)
            _print(table, row)
    if args.publish:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(record.path.with_suffix(".csv"), RESULTS)
    failed = [row for row in record.rows if row.get("error") or row["fails"]]
    print(f"{len(record.rows)} compilations, {len(failed)} fail")
    return console.WRONG_RESULT if failed else 0


def _print(table: console.Table, row: Row) -> None:
    names = ("kernel", "case", "tile", "dtype", "target")
    if "error" in row:
        table.line([*(row.get(name, "") for name in names), *[""] * 7], console.red(row["error"]))
        return
    shares = [f"{row[s]:.2f}" if s in row else "" for s in ("share", "dense_share")]
    figures = [str(row[name]) for name in ("registers", "spills", "shared")]
    cells = [*figures, f"{row['occupancy']:.2f}", str(row["loop"]), *shares]
    table.line([*(row.get(name, "") for name in names), *cells], console.red(row["fails"]))


if __name__ == "__main__":
    sys.exit(main())
