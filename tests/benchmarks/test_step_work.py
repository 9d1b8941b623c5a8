"""What a step has to do, against counts by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.matmul_predictor import Gemm
from benchmarks.step_work import BYTES, Layer, meta_model, occupied
from neq_kernels.problem import ConvGeometry, Problem
from tests.benchmarks.predict_cases import STACK, work_of


def test_products_of_a_strided_convolution():
    geometry = ConvGeometry((2, 2), (1, 1), (1, 1), False, (0, 0), 1)
    problem = Problem((2, 16, 8, 8), (32, 16, 3, 3), geometry, True, torch.bfloat16)
    layer = Layer("conv", problem, True)
    t = 2 * 4 * 4
    assert layer.forward().gemm == Gemm(t, 32, 16 * 9)
    assert layer.wgrad(5, 0).gemm == Gemm(5, 16 * 9, t)
    m, n, k, _ = layer.dgrad().gemm
    assert (m, n) == (2 * 8 * 8, 16)
    assert m * n * k == t * 32 * 16 * 9
    assert layer.forward().operand_bytes == BYTES * (2 * 16 * 8 * 8 + 32 * 16 * 9)
    assert layer.wgrad(5, 7).operand_bytes == BYTES * 2 * 16 * 8 * 8 + 7


def test_share_of_the_sectors_that_hold_an_active_channel():
    def layer(k, last):
        geometry = ConvGeometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
        return Layer("", Problem((1, 4, 2, 2), (k, 4, 1, 1), geometry, last, torch.half), True)

    k, together = 18, 16
    for n in (1, 2, 3):
        hit = [min(chosen) < together for chosen in itertools.combinations(range(k), n)]
        assert occupied(layer(k, True), n) == pytest.approx(sum(hit) / len(hit))
        assert occupied(layer(k, False), n) == pytest.approx(n / k)
    assert occupied(layer(8, True), 1) == 1
    assert occupied(layer(k, True), k) == occupied(layer(k, False), k) == 1


def test_bytes_that_are_no_product():
    def plain(classes):
        return nn.Sequential(nn.Linear(8, 32), nn.Linear(32, classes))

    def more(*layers):
        return lambda classes: nn.Sequential(nn.Linear(8, 32), *layers, nn.Linear(32, classes))

    def bytes_of(build):
        work = work_of(Case("", build, 600, (8,), layouts=("any",)))
        return work.forward_bytes, work.backward_bytes

    size = BYTES * 600 * 32
    base = bytes_of(plain)
    relu = bytes_of(more(nn.ReLU()))
    assert (relu[0] - base[0], relu[1] - base[1]) == (2 * size, 3 * size)
    norm = bytes_of(more(nn.BatchNorm1d(32, affine=False)))
    assert 3 * size <= norm[0] - base[0] < 3.1 * size
    assert 5 * size <= norm[1] - base[1] < 5.1 * size
    assert bytes_of(more(nn.Unflatten(1, (4, 8)), nn.Flatten())) == base


def test_transposed_convolutions_are_refused():
    def transposed(classes):
        layers = nn.ConvTranspose2d(3, classes, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers)

    with pytest.raises(ValueError, match=r"0: expected a convolution"):
        work_of(Case("", transposed, 2, (3, 4, 4)), "nchw")
    with pytest.raises(ValueError, match="dtype: expected one of bf16, fp16, got 'int8'"):
        meta_model(STACK, "any", "int8")
