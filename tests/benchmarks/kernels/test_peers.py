"""Every peer computes the dense gradient of the active rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.peers import PROVIDERS, Provider
from neq_kernels.backends.problem import ConvGeometry

K = 8
ACTIVE = {
    "ragged": torch.tensor([1, 4, 6]),
    "run": torch.tensor([0, 1, 2]),
    "one": torch.tensor([5]),
    "all": torch.arange(K),
    "none": torch.arange(0),
}


def conv(groups: int = 1, stride: int = 1) -> ConvGeometry:
    return ConvGeometry((stride, stride), (1, 1), (1, 1), False, (0, 0), groups)


LAYERS = {
    "linear": (None, (2, 5, 12), (2, 5, K), (K, 12)),
    "conv": (conv(), (2, 6, 7, 7), (2, K, 7, 7), (K, 6, 3, 3)),
    "strided": (conv(stride=2), (2, 6, 8, 8), (2, K, 4, 4), (K, 6, 3, 3)),
    "depthwise": (conv(groups=K), (2, K, 7, 7), (2, K, 7, 7), (K, 1, 3, 3)),
    "grouped": (conv(groups=2), (2, 6, 7, 7), (2, K, 7, 7), (K, 3, 3, 3)),
}


def expected(geometry, grad_output, x, weight):
    if geometry is None:
        dy = grad_output.reshape(-1, K)
        return dy.t() @ x.reshape(-1, x.shape[-1]), dy.sum(0)
    _, dw, db = geometry.backward(grad_output, x, weight, (False, True, True))
    return dw, db


def check(provider: Provider, layer: str, active: torch.Tensor, bias: bool, channels_last: bool):
    geometry, *shapes = LAYERS[layer]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if channels_last and geometry is not None:
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    x, grad_output, weight = tensors
    wanted = expected(geometry, grad_output, x, weight)
    found = provider.wgrad(geometry, grad_output, x, weight, active, bias)
    if provider.name == "requires_grad" and len(active) == 0:
        assert found[0].numel() == 0
        assert found[1] is None
        return
    frozen = [k for k in range(K) if k not in active.tolist()]
    for got, want, asked in zip(found, wanted, (True, bias), strict=True):
        if not asked:
            assert got is None
            continue
        rows = got if provider.rows == "active" else got[active]
        torch.testing.assert_close(rows, want[active], rtol=1e-12, atol=1e-12)
        if provider.rows == "masked":
            assert (got[frozen] == 0).all()
        elif provider.rows == "all":
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


EAGER = [p for p in PROVIDERS.values() if p.name not in ("compiled", "grouped_mm")]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("provider", EAGER, ids=lambda p: p.name)
def test_active_rows_are_dense_and_frozen_rows_zero(provider, layer, active, channels_last):
    n = len(ACTIVE[active])
    chosen = torch.arange(n) if provider.contiguous else ACTIVE[active]
    for bias in (True, False):
        check(provider, layer, chosen, bias, channels_last)


@pytest.mark.parametrize("active", ACTIVE)
def test_grouped_mm(active):
    provider = PROVIDERS["grouped_mm"]
    assert provider.why_not(None, torch.empty(K, 12)) is None
    geometry, *shapes = LAYERS["linear"]
    x, grad_output, weight = (torch.randn(shape) for shape in shapes)
    want = expected(geometry, grad_output, x, weight)
    got = provider.wgrad(geometry, grad_output, x, weight, ACTIVE[active], True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g[ACTIVE[active]], w[ACTIVE[active]])
        assert int((g != 0).any(-1).sum() if g.dim() > 1 else (g != 0).sum()) == len(ACTIVE[active])


def test_compiled_is_peer_1(stock_algorithms):
    for layer in ("linear", "conv"):
        check(PROVIDERS["compiled"], layer, ACTIVE["ragged"], True, False)


@pytest.mark.parametrize("name", ["index_select", "permuted", "compiled"])
def test_what_cannot_be_compacted_says_so(name):
    why_not = PROVIDERS[name].why_not
    for layer, (geometry, _, _, weight) in LAYERS.items():
        reason = why_not(geometry, torch.empty(weight))
        assert (reason is not None) == (layer == "grouped")
    transposed = ConvGeometry((1,), (0,), (1,), True, (0,), 1)
    assert "transposed" in why_not(transposed, torch.empty(4, 4, 1))


def test_grouped_mm_is_for_linear_layers():
    why_not = PROVIDERS["grouped_mm"].why_not
    assert "linear" in why_not(conv(), torch.empty(K, 6, 3, 3))
    assert "16 bytes" in why_not(None, torch.empty(K, 3))
