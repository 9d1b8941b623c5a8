"""The predicted time of a weight gradient on GPUs, by roofline. Nothing here is timed, and no GPU
is needed.

>>> python -m benchmarks.kernels.roofline
>>> python -m benchmarks.kernels.roofline --publish    # writes the committed tables

Predicted, of the layers that ``benchmarks.gpu_session`` times, in bfloat16: the longer of the bytes
at the memory's bandwidth and the arithmetic at the peak of the tensor cores (of depthwise
convolutions: of float32 outside them), both from data sheets. No kernel reaches either; launches,
tiles and latencies are not counted.

- dense: reads dY and X, writes the gradient.
- custom: one kernel that reads the 32-byte sectors of dY that hold an active channel (the expected
  number, channels being active at random) and X, and writes the gradient, zeros included.
- packed: reads those sectors, writes the active channels side by side; PyTorch's product reads them
  and X and writes active rows; these are read, the gradient written.
- with ratio: custom, whose bytes are more by the ratio that ``tests.cuda_on_cpu.traffic`` counted
  for the case most like this one: the CUDA C++ kernels' of few rows and of depthwise convolutions.
  Others read their operands again for every tile; how much of that a cache absorbs is not known.

Of X count the pixels that the kernel passes over; of a depthwise convolution those of the active
channels alone, which are packed too. Each operand crosses the memory's bus once.
"""

from __future__ import annotations

import functools
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import cli, markdown
from benchmarks.common.files import RESULTS
from benchmarks.common.readme_block import Block
from benchmarks.common.records import Record, Row, load_csv
from benchmarks.kernels.data_sheets import GPUS, Gpu
from benchmarks.kernels.layer_shapes import Shape, gpu_shapes
from neq_kernels.backends.problem import Problem

NOTICE = "Predicted by roofline: nothing here was timed on a GPU."
SHARES = (1.0, 0.5, 0.25, 0.1, 0.02)
SECTOR, ITEM = 32, 2
# Neurons that the kernels for few rows take.
FEW = 16
TABLE = RESULTS / "roofline.csv"
TRAFFIC = RESULTS / "traffic.csv"
BLOCK = Block("roofline", "python -m benchmarks.kernels.roofline --publish")
COLUMNS = (
    ("layer", -36),
    ("layout", -6),
    ("GPU", -4),
    ("r", 4),
    ("predicted dense µs", 18),
    ("bound", -7),
    ("predicted custom µs", 19),
    ("bound", -7),
    ("predicted with ratio µs", 23),
    ("predicted packed µs", 19),
    ("predicted speed-up custom", 25),
    ("packed", 6),
)


@dataclass(frozen=True)
class Work:
    """Of one kernel, or of several that run one after the other: bytes and FLOPs of each."""

    parts: tuple[tuple[float, float], ...]

    def seconds(self, gpu: Gpu, peak: float, ratio: float = 1.0) -> float:
        """Predicted: every part takes the longer of both."""
        return sum(max(ratio * b / gpu.bandwidth, f / peak) for b, f in self.parts)

    def bound(self, gpu: Gpu, peak: float) -> str:
        """What takes longer, in all parts together."""
        memory = sum(b for b, _ in self.parts) / gpu.bandwidth
        return "memory" if memory >= sum(f for _, f in self.parts) / peak else "compute"


@functools.lru_cache(maxsize=1024)
def expected_sectors(channels: int, inner: int, n: int) -> float:
    """The expected number of 32-byte sectors of a dense bfloat16 ``[channels, inner]`` that hold an
    element of ``n`` channels chosen at random. It begins with a sector."""
    per_sector = SECTOR // ITEM
    elements, sectors = channels * inner, 0.0
    for begin in range(0, elements, per_sector):
        end = min(begin + per_sector, elements) - 1
        sectors += _any_active(channels, end // inner - begin // inner + 1, n)
    return sectors


@functools.lru_cache(maxsize=8192)
def _any_active(channels: int, here: int, n: int) -> float:
    """The probability that of ``here`` channels at least one is among the ``n``."""
    return 1.0 - math.comb(channels - here, n) / math.comb(channels, n)


def needed_bytes(size: Sequence[int], channels_inside: bool, n: int) -> float:
    """Of a dense tensor ``[outer, channels, ...]`` in whole sectors, ``n`` channels of it active:
    of matrices and of images."""
    outer, channels, inner = size[0], size[1], math.prod(size[2:])
    if channels_inside:
        # Rows that fill no whole number of sectors shift against these; each is taken to begin one.
        return SECTOR * outer * inner * expected_sectors(channels, 1, n)
    return SECTOR * outer * expected_sectors(channels, inner, n)


def needed_part(problem: Problem) -> float:
    """The share of X that the kernel passes over."""
    g = problem.geometry
    if g is None:
        return 1.0
    shares: list[float] = []
    numbers = zip(
        *(problem.input_size[2:], _output(problem), problem.weight_size[2:]),
        *(g.stride, g.padding, g.dilation),
        strict=True,
    )
    for size, out, kernel, stride, padding, dilation in numbers:
        at = {o * stride - padding + tap * dilation for o in range(out) for tap in range(kernel)}
        shares.append(len(at & set(range(size))) / size)
    # Pixels that lie side by side share sectors.
    return shares[0] * (shares[1] if problem.channels_last else 1.0)


def _output(problem: Problem) -> list[int]:
    g = problem.geometry
    assert g is not None
    numbers = zip(
        *(problem.input_size[2:], problem.weight_size[2:], g.stride, g.padding, g.dilation),
        strict=True,
    )
    return [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in numbers]


def works(problem: Problem, n: int) -> dict[str, Work]:
    """Dense, custom and packed, with ``n`` active channels."""
    k, inputs = problem.neurons, problem.weight_size[1]
    taps = math.prod(problem.weight_size[2:])
    inside = problem.geometry is None or problem.channels_last
    out = [] if problem.geometry is None else _output(problem)
    positions = problem.output_positions
    dy_size = (problem.input_size[0], k, *out)
    grad, rows = ITEM * k * inputs * taps, ITEM * n * inputs * taps
    flops = 2 * positions * inputs * taps
    dy, dy_needed = ITEM * positions * k, needed_bytes(dy_size, inside, n)
    x = ITEM * math.prod(problem.input_size) * needed_part(problem)
    x_needed, x_packed, packing = x, x, dy_needed + ITEM * positions * n
    if problem.is_depthwise:
        x_needed = needed_bytes(problem.input_size, inside, n) * needed_part(problem)
        x_packed = x * n / k
        packing += x_needed + x_packed
    dense = Work(((dy + x + grad, flops * k),))
    packed = Work(
        (
            (packing, 0.0),
            (ITEM * positions * n + x_packed + rows, flops * n),
            (rows + grad, 0.0),
        )
    )
    custom = Work(((dy_needed + x_needed + grad, flops * n),))
    return {"dense": dense, "custom": custom, "packed": dense if n == k else packed}


def counted_ratio(problem: Problem, n: int, traffic: Sequence[Row]) -> float | None:
    """Of the bytes moved to the least, in the case of the traffic's table most like this one; None
    where there is no such kernel."""
    inputs, kernel = problem.weight_size[1], problem.weight_size[2:]
    if problem.is_depthwise:
        operation = f"depthwise {'nhwc' if problem.channels_last else 'nchw'}"
    elif n > FEW or problem.neurons % 8 or inputs % 8:
        return None
    elif problem.geometry is None:
        operation = "linear few rows"
    elif problem.channels_last and kernel == (3, 3) and problem.geometry.stride == (1, 1):
        operation = "conv few rows"
    else:
        return None
    side = problem.input_size[-1] if problem.geometry is not None else 1
    share = n / problem.neurons if problem.is_depthwise else n
    about = share, inputs, kernel[0] if kernel else 1, side

    def distance(row: Row) -> float:
        active = row["share"] if problem.is_depthwise else row["active"]
        its = active, row["inputs"], row["kernel"], row["side"]
        return sum(abs(math.log2(a / b)) for a, b in zip(about, its, strict=True))

    alike = [r for r in traffic if (r["operation"], r["dtype"]) == (operation, "bfloat16")]
    return float(min(alike, key=distance)["ratio"]) if alike else None


def rows(shapes: Sequence[Shape], traffic: Sequence[Row]) -> Iterator[Row]:
    """The predictions."""
    for shape in shapes:
        problem, k = shape.problem, shape.problem.neurons
        for name, gpu in GPUS.items():
            peak = gpu.vector_flops if problem.is_depthwise else gpu.tensor_flops
            for share in SHARES:
                n = max(1, round(share * k))
                ratio = counted_ratio(problem, n, traffic) if n < k else None
                work = works(problem, n)
                seconds = {way: each.seconds(gpu, peak) for way, each in work.items()}
                row: Row = {
                    "network": shape.network,
                    "layer": shape.layer,
                    "layout": shape.layout,
                    "gpu": name,
                    "r": share,
                    "active": n,
                    "neurons": k,
                }
                for way, each in work.items():
                    row[f"{way}_least_bytes"] = sum(b for b, _ in each.parts)
                    row[f"predicted_{way}_seconds"] = seconds[way]
                    row[f"predicted_{way}_bound"] = each.bound(gpu, peak)
                row["counted_ratio"] = "" if ratio is None else ratio
                row["predicted_custom_seconds_with_ratio"] = (
                    "" if ratio is None else work["custom"].seconds(gpu, peak, ratio)
                )
                row["predicted_speedup_custom"] = seconds["dense"] / seconds["custom"]
                row["predicted_speedup_packed"] = seconds["dense"] / seconds["packed"]
                yield row


def bfloat16_shapes() -> list[Shape]:
    """Of the GPU's shape set those in bfloat16."""
    return [shape for shape in gpu_shapes() if shape.problem.dtype == torch.bfloat16]


def page_table(rows: Sequence[Row], gpu: str = "H100") -> str:
    """Markdown: a line for each layer with its channels innermost, a column for each share. A cell
    holds the predicted speed-up of the custom kernel, with the counted ratio in brackets, and of
    packing; and what bounds the custom kernel."""
    chosen = [row for row in rows if row["gpu"] == gpu and row["layout"] != "nchw"]
    shares = [r for r in dict.fromkeys(row["r"] for row in chosen) if r < 1]
    cells = {(row["network"], row["layer"], row["r"]): row for row in chosen}
    titles = ["layer", "predicted dense, µs", *(f"predicted at r = {r:g}" for r in shares)]
    lines = []
    for network, layer in dict.fromkeys((row["network"], row["layer"]) for row in chosen):
        of = [cells[network, layer, r] for r in shares]
        dense = f"{1e6 * of[0]['predicted_dense_seconds']:.1f} {of[0]['predicted_dense_bound']}"
        lines.append([f"{network} {layer}", dense, *map(_cell, of)])
    return "\n".join([*markdown.table(titles, lines), ""])


def _cell(row: Row) -> str:
    known = row.get("predicted_custom_seconds_with_ratio")
    bracket = f" ({row['predicted_dense_seconds'] / known:.2f})" if known else ""
    custom, packed = row["predicted_speedup_custom"], row["predicted_speedup_packed"]
    return f"{custom:.2f}{bracket} / {packed:.2f} {row['predicted_custom_bound']}"


def published() -> str:
    """The block's text, from the committed table."""
    return page_table(load_csv(TABLE)[1])


def publish(csv: Path) -> list[Path]:
    """Copy the table, and write the page's one from the copy.

    Raises:
        ValueError: the page has no place for the table.
    """
    BLOCK.text()
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(csv, TABLE)
    BLOCK.write(published())
    return [TABLE, BLOCK.page]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument(
        "--traffic",
        type=Path,
        default=TRAFFIC,
        help="the CSV of tests.cuda_on_cpu.traffic (%(default)s)",
    )
    parser.add_argument("--publish", action="store_true", help="write the tables of the repository")
    given = parser.parse_args(arguments)
    try:
        traffic = load_csv(given.traffic)[1] if given.traffic.exists() else []
        with Record(given.out, "roofline", {"traffic": str(given.traffic)}) as record:
            print(NOTICE)
            table = cli.Table(COLUMNS)
            for row in rows(bfloat16_shapes(), traffic):
                record.add(row)
                _print(table, row)
        if given.publish:
            print("\n".join(map(str, publish(record.path.with_suffix(".csv")))))
    except (OSError, ValueError) as error:
        return cli.user_error(error)
    return 0


def _print(table: cli.Table, row: Row) -> None:
    known = row["predicted_custom_seconds_with_ratio"]
    table.line(
        [
            f"{row['network']} {row['layer']}"[-36:],
            row["layout"],
            row["gpu"],
            f"{row['r']:g}",
            f"{1e6 * row['predicted_dense_seconds']:.1f}",
            row["predicted_dense_bound"],
            f"{1e6 * row['predicted_custom_seconds']:.1f}",
            row["predicted_custom_bound"],
            f"{1e6 * known:.1f}" if known else "",
            f"{1e6 * row['predicted_packed_seconds']:.1f}",
            f"{row['predicted_speedup_custom']:.2f}",
            f"{row['predicted_speedup_packed']:.2f}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
