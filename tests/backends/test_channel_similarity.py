"""The op behind the similarity of two outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neq_kernels import ops
from neq_kernels.backends import aten
from tests.support import oracle
from tests.support.op_cases import in_format


@settings(max_examples=40)
@given(data=st.data())
def test_channel_similarity_is_three_inner_products(backend, data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    formats = data.draw(
        st.tuples(*[st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"])] * 2)
    )
    a, b = (oracle.small_integers(shape) for _ in range(2))
    rows_a, rows_b = (t.movedim(dim, 0).unsqueeze(-1).flatten(1) for t in (a, b))
    exact = torch.stack([(rows_a * rows_b).sum(1), (rows_a**2).sum(1), (rows_b**2).sum(1)])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        low = [in_format(t.to(dtype), f) for t, f in zip((a, b), formats, strict=True)]
        result = ops.channel_similarity(*low, dim)
        assert result.dtype == torch.float64
        assert torch.equal(result, exact)


def test_channel_similarity_accumulates_in_float64(backend):
    a = torch.full((1, 100_000), 1e-4)
    a[0, 0] = 100.0
    b = a.flip(1)
    a, b = a.double(), b.double()
    exact = torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
    result = ops.channel_similarity(a.float(), b.float(), 0)
    for ours, true in zip(result, exact, strict=True):
        oracle.assert_close64(ours, true, 1e-11)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_channel_similarity_of_many_parts(backend, dim, monkeypatch):
    """More elements than are worked on at once, the last part a shorter one."""
    monkeypatch.setattr(aten, "_ELEMENTS_ON_CPU", 100)
    a, b = (oracle.small_integers((13, 17, 9)) for _ in range(2))
    rows_a, rows_b = (t.movedim(dim, 0).flatten(1) for t in (a, b))
    exact = torch.stack([(rows_a * rows_b).sum(1), (rows_a**2).sum(1), (rows_b**2).sum(1)])
    assert torch.equal(ops.channel_similarity(a.float(), b.float(), dim), exact)


def test_channel_similarity_keeps_nan_in_its_channel(backend):
    a, b = (torch.randn(5, 9, 4) for _ in range(2))
    clean = ops.channel_similarity(a, b, 1)
    a[2, 3, 1] = torch.nan
    result = ops.channel_similarity(a, b, 1)
    assert result[:2, 3].isnan().all()
    result[:2, 3] = clean[:2, 3]
    assert torch.equal(result, clean)


@pytest.mark.parametrize(
    ("a", "b", "dim", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), 0, ValueError, r"b: expected a's shape \(2, 3\), got"),
        (torch.ones(2, 3), torch.ones(2, 3), 2, ValueError, r"dim: expected one of 2 .*, got 2"),
        (torch.ones(2, 3), torch.ones(2, 3), -3, ValueError, r"dim: expected one of 2 .*, got -3"),
        (torch.ones(2).long(), torch.ones(2), 0, TypeError, r"a: expected a floating.*int64"),
        (torch.ones(2), torch.ones(2).long(), 0, TypeError, r"b: expected a floating.*int64"),
    ],
)
def test_channel_similarity_refuses(a, b, dim, error, message):
    with pytest.raises(error, match=message):
        ops.channel_similarity(a, b, dim)
