"""Gradients that a CUDA graph would replay with other channels active. No graph is captured here:
the rehearsal of one is running, and what the host knows of the channels is stale."""

from __future__ import annotations

import pytest
import torch

from neq_kernels import functional, ops
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch.selection import selector
from tests.support import oracle

BEFORE, AFTER = [True, True, False, False, False, True], [False, True, True, True, True, False]


@pytest.fixture
def _captured(monkeypatch):
    monkeypatch.setattr(selector.rehearsal, "is_running", True)
    monkeypatch.setattr(selector, "backends_for", lambda device_type: ("aten",))


def replayed(before, after):
    """The tensors of ``after``, with the host's numbers of ``before``."""
    stale = oracle.channels_with(before).host_count.clone()
    channels = oracle.channels_with(after)
    return channels.order(), channels.count(), stale


GEOMETRIES = {
    "conv": (ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1), (6, 4, 3, 3)),
    "grouped": (ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 2), (6, 2, 3, 3)),
    "transposed": (ConvGeometry((1, 1), (1, 1), (1, 1), True, (0, 0), 2), (4, 3, 3, 3)),
}


@pytest.mark.usefixtures("_captured")
@pytest.mark.parametrize("before", [BEFORE, [True] * 6, [False] * 6])
@pytest.mark.parametrize("after", [AFTER, [True] * 6, [False] * 6])
@pytest.mark.parametrize("name", ["linear", *GEOMETRIES])
def test_the_channels_of_the_replay_count(name, after, before):
    active = replayed(before, after)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    if name == "linear":
        x, weight = x[..., 0, 0], torch.randn(6, 4, dtype=torch.float64)
        dy = torch.randn(2, 6, dtype=torch.float64)
        got = ops.linear_backward(dy, x, x.shape, weight, active, [True] * 3, False)
        exact = dy @ weight, dy.t() @ x, dy.sum(0)
        frozen_rows = exact[1]
    else:
        geometry, shape = GEOMETRIES[name]
        weight = torch.randn(shape, dtype=torch.float64)
        dy = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        got = ops.conv_backward(dy, x, x.shape, weight, geometry, active, [True] * 3, False)
        exact = geometry.backward(dy, x, weight, (True, True, True))
        frozen_rows = geometry.layout.rows(exact[1])
    frozen = ~torch.tensor(after)
    frozen_rows[frozen.view(frozen_rows.shape[: 2 if name == "transposed" else 1])] = 0
    exact[2][frozen] = 0
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_captured")
@pytest.mark.parametrize("mask", [[True] * 6, [False] * 6])
def test_layers_record_their_own_backward_whatever_is_active_now(mask):
    weight = torch.randn(6, 4, requires_grad=True)
    out = functional.linear(torch.randn(2, 4), weight, None, oracle.channels_with(mask))
    assert type(out.grad_fn).__name__ == "LinearFunctionBackward"
    out.sum().backward()
    assert bool(weight.grad.any(1).eq(torch.tensor(mask)).all())
    scale = torch.ones(6, requires_grad=True)
    masked, _ = functional.affine(scale, None, oracle.channels_with(mask))
    masked.sum().backward()
    assert scale.grad.tolist() == [float(m) for m in mask]


@pytest.mark.usefixtures("_captured")
def test_the_approximate_input_gradient_is_refused():
    x = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    channels = ActiveChannels(6)
    out = functional.linear(x, weight, None, channels, grad_input="active")
    with pytest.raises(RuntimeError, match='grad_input: expected "exact" while a CUDA graph'):
        out.sum().backward()
