"""What launches move, on kernels whose requests can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_on_cpu.cases import library, line_of, product
from tests.cuda_on_cpu.emulator import Launch, Mode, Run
from tests.cuda_on_cpu.traffic.launch import Requests


def aligned(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ones that begin with a sector."""
    spare = torch.ones(n + 32, dtype=dtype)
    first = -spare.data_ptr() % 32 // spare.element_size()
    return spare[first : first + n]


def launch(function: str, *arguments, out: torch.Tensor, x: torch.Tensor | None = None) -> Launch:
    tensors = {"out": out} if x is None else {"x": x, "out": out}
    run = Run(library("probes.cu"), Mode(), writes=tensors)
    run.call(f"run_{function}", *tensors.values(), *arguments)
    return run.launches[0]


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(1, 0, 4), (1, 1, 5), (2, 0, 8), (2, 7, 9), (8, 0, 32), (32, 0, 32), (0, 3, 1)],
)
def test_sectors_of_a_load(stride, offset, sectors):
    x, out = aligned(2048), aligned(32)
    made = launch("load", stride, offset, 1, x=x, out=out)
    assert made.regions["x"].loads == Requests(1, sectors, 128)
    assert made.regions["x"].read_bytes == (128 if stride else 4)
    assert made.regions["x"].read_sectors == sectors
    assert made.regions["x"].stores == Requests()
    assert made.regions["out"].stores == Requests(1, 4, 128)
    assert made.total.moved_bytes == (sectors + 4) * 32


def test_every_turn_of_a_loop_is_a_request():
    x, out = aligned(2048), aligned(32)
    made = launch("load", 1, 0, 5, x=x, out=out)
    assert made.regions["x"].loads == Requests(5, 20, 640)
    again = launch("load", 0, 0, 5, x=x, out=out)
    assert again.regions["x"].loads == Requests(5, 5, 640)
    assert (again.regions["x"].read_bytes, again.regions["x"].read_sectors) == (4, 1)


def test_sixteen_bit_elements():
    x, out = aligned(2048, torch.float16), aligned(32)
    assert launch("load_half", 1, 0, 1, x=x, out=out).regions["x"].loads == Requests(1, 2, 64)
    assert launch("load_half", 16, 0, 1, x=x, out=out).regions["x"].loads == Requests(1, 32, 64)


@pytest.mark.parametrize("how", range(4), ids=["float4", "__ldg", "load_16", "float2"])
def test_vectors_are_moved_at_once(how):
    x, out = aligned(128), aligned(64)
    made = launch("load_vectors", how, x=x, out=out)
    assert made.regions["x"].loads == Requests(1, 16, 256 if how == 3 else 512)
    assert made.regions["out"].stores == Requests(1, 8, 256)


def test_lanes_that_skip_rounds_join_no_earlier_request():
    made = launch("load_in_turns", x=aligned(128), out=aligned(32))
    # Rounds 0 to 3 have 32, 24, 16 and 8 lanes: 4, 3, 2 and 1 sectors.
    assert made.regions["x"].loads == Requests(4, 10, 4 * (32 + 24 + 16 + 8))


def test_atomics_are_counted_apart():
    made = launch("add_all", 1, out=aligned(32))
    assert made.regions["out"].atomics == Requests(1, 4, 128)
    assert made.regions["out"].loads == made.regions["out"].stores == Requests()
    assert made.regions["out"].least_bytes == 2 * 128


def test_lines_name_where_the_sectors_go():
    first, second = launch("load", 8, 0, 2, x=aligned(2048), out=aligned(32)).lines
    assert (first.region, first.access, first.counts) == ("x", "loads", Requests(2, 64, 256))
    assert first.line == line_of("probes.cu", "x[(i * 32 + threadIdx.x) * stride + offset]")
    assert (second.region, second.access) == ("out", "stores")


def test_a_product_that_fits_moves_no_more_than_it_must():
    m = n = 64
    k = 256
    (_, made) = product(library("product.cu"), Mode(), shape=(m, n, k))
    assert made.regions["a"].loads == Requests(k * m // 8 // 32, k * m * 2 // 32, k * m * 2)
    assert made.regions["out"].stores.bytes == m * n * 4
    assert made.total.moved_bytes == made.total.least_bytes
    fast = product(library("product.cu", checked=False), Mode(), shape=(m, n, k))[-1]
    with pytest.raises(ValueError, match="a fast build counts nothing"):
        _ = fast.total
    # Each element is copied into shared memory once; the fragments of a and b are read twice.
    assert made.shared_bytes_read == 2 * 2 * (m + n) * k
