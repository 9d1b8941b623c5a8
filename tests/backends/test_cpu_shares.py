"""How the extension shares out work among threads, for any number of them: by arithmetic."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from benchmarks.kernels.layer_shapes import NAMES, TINY, shape_set
from neq_kernels.dispatch import trial
from tests.support.arrange import order_of
from tests.support.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="tests of the extension")

leaf = torch.ops.neq_kernels_cpu

THREADS = (1, 2, 4, 8, 16, 32, 64)
ACTIVE = (1, 0.5, 0.25, 0.1, 0)
MOST_UNEVEN = 1.15
LEAST_PRODUCTS, LEAST_ELEMENTS = 1 << 15, 1 << 13
LINE = 64
SHAPES = [
    shape
    for shape in shape_set((*NAMES, TINY))
    if shape.problem.geometry is None
    or shape.problem.geometry.groups == 1
    or shape.problem.is_depthwise
]


def check(table, least):
    """Columns: loop, share, work, memory, begin, length, inner, its stride, outer, its stride."""
    for loop in numpy.unique(table[:, 0]):
        rows = table[table[:, 0] == loop]
        work = numpy.bincount(rows[:, 1], rows[:, 2])
        if len(work) > 1:
            assert work.max() <= MOST_UNEVEN * work.mean()
            assert work.min() >= least[loop]
        assert len(lines_of_several(rows)) == 0


def ends(rows):
    """The first and the last byte of every stretch that is written, and whose share it is."""
    rows = rows[rows[:, 5] > 0]
    inner = numpy.arange(rows[:, 6].max(initial=0))[None, None, :]
    outer = numpy.arange(rows[:, 8].max(initial=0))[None, :, None]
    share, memory, begin, length, n_inner, step, n_outer, outer_step = (
        column[:, None, None] for column in rows[:, [1, 3, 4, 5, 6, 7, 8, 9]].T
    )
    first = memory * (1 << 50) + begin + inner * step + outer * outer_step
    there = (inner < n_inner) & (outer < n_outer)
    return [(at[there], (share + 0 * at)[there]) for at in (first, first + length - 1)]


def lines_of_several(rows):
    """Lines that several shares write to."""
    found = [numpy.stack([at // LINE, share]) for at, share in ends(rows)]
    lines = numpy.unique(numpy.concatenate(found, axis=1), axis=1)[0]
    return lines[1:][lines[1:] == lines[:-1]]


def arguments(problem):
    geometry = problem.geometry
    if geometry is None:
        rows = math.prod(problem.input_size[:-1])
        size = (1, problem.input_size[-1], rows, 1)
        return size, (*problem.weight_size, 1, 1), (1, 1), (0, 0), (1, 1), True
    window = (geometry.stride, geometry.padding, geometry.dilation)
    return problem.input_size, problem.weight_size, *window, problem.channels_last


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
def test_wgrad_of_every_shape(half, threads):
    shared = 0
    for shape in SHAPES:
        problem = shape.problem
        k = problem.neurons
        for part in ACTIVE:
            n = max(1, round(part * k))
            order = trial.spread(n, k).order()
            table = leaf.wgrad_shares(*arguments(problem), half, order, n, threads).numpy()
            check(table, {0: LEAST_PRODUCTS, 1: LEAST_ELEMENTS})
            assert table[:, 1].max() < threads
            shared += table[table[:, 0] == 0, 1].max() + 1
    # Shares that are even because there is only one would prove nothing.
    assert shared >= 0.4 * threads * len(SHAPES) * len(ACTIVE) or threads > 16
    assert shared > len(SHAPES) * len(ACTIVE) or threads == 1


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("c", [3, 16, 40, 64])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
def test_the_whole_gradient_is_written(half, c, channels_last, threads):
    window = ((1, 1), (1, 1), (1, 1))
    k = 500
    for n in (1, 100, k):
        order = order_of(k, n, seed=n)
        size, weight = (4, c, 32, 32), (k, c, 3, 3)
        where = (size, weight, *window, channels_last, half)
        table = leaf.wgrad_shares(*where, order, n, threads).numpy()
        written = numpy.zeros(k * c * 9 * (2 if half else 4), bool)
        in_place = not ((table[:, 0] == 1) & (table[:, 3] == 0)).any()
        rows = table[(table[:, 3] == 1) & (table[:, 5] > 0)]
        for _, _, _, _, begin, length, inner, step, outer, outer_step in rows:
            for i in range(inner):
                for o in range(outer):
                    at = begin + i * step + o * outer_step
                    assert not written[at : at + length].any() or in_place
                    written[at : at + length] = True
        assert written.all()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    "blocks",
    [
        (1, 1, 64, 576),
        (1, 1, 512, 4608),
        (1, 1, 1000, 512),
        (1, 1, 2048, 27),
        (1, 1, 100_000, 1),
        (1, 1, 5, 30_001),
        (1, 300, 130, 9),
        (1, 700, 333, 1),
        (4, 3, 32, 600),
    ],
    ids=str,
)
def test_neurons_of_any_layout(blocks, threads):
    groups, outer, per_group, inner = blocks
    k = groups * per_group
    for item_bytes in (2, 4, 8):
        for part in ACTIVE:
            n = max(1, round(part * k))
            order = order_of(k, n, seed=1)
            table = leaf.neuron_shares(order, n, blocks, item_bytes, threads).numpy()
            check(table, {0: LEAST_ELEMENTS})
            assert table[:, 5].sum() == n * outer * inner * item_bytes


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("cut_rows", [False, True], ids=["rows", "lines"])
def test_what_is_packed(cut_rows, threads):
    for rows, elements in ((8192, 32), (128, 2048), (1568, 7), (999, 101), (8, 49 * 96), (1, 9)):
        for item_bytes in (2, 4, 8):
            order = torch.arange(1)
            table = leaf.pack_shares(order, rows, elements, item_bytes, cut_rows, threads).numpy()
            check(table, {0: LEAST_ELEMENTS})
            assert table[:, 5].sum() == rows * elements * item_bytes
