"""Every kernel in Triton and CUDA C++, compiled for GPUs that are not there: what comes of it.

Nothing is timed. A kernel fails that spills registers, of which not one program fits on a
multiprocessor, or that multiplies matrices without a tensor core; the main loop's share of
tensor-core instructions stands beside that of a plain dense product of the same tile, and a product
fails that does not gather as it multiplies and has less than nine tenths of it. (One whose operand
is gathered has more to do in its main loop.) Occupancy: the share of a multiprocessor's warps that
can be resident.

>>> python -m benchmarks.inspection.gpu_kernels
>>> python -m benchmarks.inspection.gpu_kernels --publish    # to benchmarks/results
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.common import cli
from benchmarks.common.files import RESULTS
from benchmarks.common.records import Record, Row
from benchmarks.inspection import cuda_kernels, cuda_launches
from benchmarks.inspection.compile import TARGETS, Compiled, Launch, compile_for, recorded
from benchmarks.inspection.dense_product import product
from benchmarks.inspection.gate import judged
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.backends.triton import conv_wgrad, linear_wgrad, row_steps, tiles
from neq_kernels.backends.triton.depthwise_wgrad import depthwise_wgrad
from neq_kernels.backends.triton.pack import gather, scatter
from neq_kernels.backends.triton.tiles import Tiles

TABLE = RESULTS / "targets.csv"
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
ALL_TARGETS = list(dict.fromkeys([*cuda_kernels.TARGETS, *TARGETS]))
PRODUCTS = ("wgrad_kernel", "product_kernel")
# What kernels do that have not one case alone.
JOBS = {"gather_kernel": "pack", "scatter_kernel": "finish", "add_parts_kernel": "finish"}
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
        "job": JOBS.get(launch.name, case.name.split()[0]),
        "target": target,
        "language": "triton",
        "compiler": f"triton {triton.__version__}",
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
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--targets", nargs="+", choices=ALL_TARGETS, default=ALL_TARGETS)
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, help="default: all there are")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument("--publish", action="store_true", help=f"copy the table to {TABLE.name}")
    args = parser.parse_args(arguments)
    languages = args.languages or list(LANGUAGES)
    why = cuda_launches.unavailable() if "cuda" in languages else None
    if why is not None:
        if args.languages:
            parser.error(f"--languages cuda: {why}")
        print(f"without the kernels in CUDA C++: {why}")
        languages.remove("cuda")
    table = cli.Table(COLUMNS)
    settings = {"targets": args.targets, "languages": languages}
    with Record(args.out, "targets", settings) as record:
        for language in languages:
            of, known = LANGUAGES[language]
            for row in of([target for target in args.targets if target in known]):
                record.add(row)
                _print(table, row)
    if args.publish:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(record.path.with_suffix(".csv"), TABLE)
    failed = [row for row in record.rows if row.get("error") or row["fails"]]
    _summarize(record.rows)
    print(f"{len(record.rows)} compilations, {len(failed)} fail")
    return cli.WRONG_RESULT if failed else 0


def _print(table: cli.Table, row: Row) -> None:
    names = [row.get(name, "") for name in ("kernel", "case", "tile", "dtype", "target")]
    if "registers" not in row:
        needs = f"needs {row['needs']}" if "needs" in row else ""
        table.line([*names, *[""] * 7], needs or cli.red(row.get("error") or row["fails"]))
        return
    shares = [f"{row[s]:.2f}" if s in row else "" for s in ("share", "dense_share")]
    figures = [str(row[name]) for name in ("registers", "spills", "shared")]
    cells = [*figures, f"{row['occupancy']:.2f}", str(row["loop"]), *shares]
    table.line([*names, *cells], cli.red(row["fails"]))


def _summarize(found: Sequence[Row]) -> None:
    """Both languages side by side, for what both do."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in found:
        if "registers" in row:
            dtype = "float32" if row["dtype"] == "float32" else "half"
            of = groups.setdefault((row["job"], dtype, row["target"]), {})
            of.setdefault(row["language"], []).append(row)
    both = {key: of for key, of in groups.items() if len(of) > 1}
    if not both:
        return
    print("\nFrom the least to the most of all kernels with this job:")
    columns = [(name, 10) for name in ("kernels", "registers", "occupancy", "tensor", "async")]
    table = cli.Table((("job", -12), ("dtype", -8), ("target", -8), ("by", -8), *columns))
    for key in sorted(both, key=lambda key: (key[0], key[1], ALL_TARGETS.index(key[2]))):
        for language, its in both[key].items():
            shares = [row["share"] for row in its if "share" in row]
            table.line(
                [
                    *(*key, language, str(len(its))),
                    _range([row["registers"] for row in its]),
                    _range([row["occupancy"] for row in its]),
                    _range(shares) if shares else "",
                    _range([row["asynchronous"] for row in its]),
                ]
            )
    print()


def _range(numbers: Sequence[float]) -> str:
    ends = [f"{n:.2f}" if isinstance(n, float) else str(n) for n in (min(numbers), max(numbers))]
    return "-".join(dict.fromkeys(ends))


LANGUAGES: dict[str, tuple[Callable[[Sequence[str]], Iterator[Row]], Iterable[str]]] = {
    "triton": (lambda targets: rows(targets), TARGETS),
    "cuda": (cuda_kernels.rows, cuda_kernels.TARGETS),
}


if __name__ == "__main__":
    sys.exit(main())
