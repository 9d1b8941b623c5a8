"""What convolutions alone have: output sizes, memory formats, kernels of depthwise ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector
from tests.support import oracle
from tests.support.backends import cpu
from tests.support.layer_cases import assert_masked, calls_of_a_step, twins


@pytest.mark.skipif(cpu.unavailable() is not None, reason="it needs the extension's kernel")
def test_with_everything_active_another_strategy_can_replace_the_library():
    plain, ours, x = twins("conv2d depthwise")
    with selector.forced_strategy(Strategy.CUSTOM):
        assert "conv_backward" in calls_of_a_step(ours, x)
        x.requires_grad_()
        for layer in (plain, ours):
            layer.zero_grad()
            (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            dx.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="it needs the extension's kernel")
def test_a_large_depthwise_convolution_is_served_by_its_own_kernel_at_any_mask():
    layer = neq.convert(nn.Conv2d(64, 64, 5, padding=2, groups=64))
    assert "conv_backward" in calls_of_a_step(layer, torch.randn(8, 64, 16, 16))


@pytest.mark.parametrize("size", [None, [9, 7], [10, 8]])
def test_output_size_of_a_transposed_convolution(size):
    plain, ours, x = twins("conv_transpose2d", oracle.half)
    outs = [layer(x, size) for layer in (plain, ours)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_masked(ours, plain)
    with pytest.raises(ValueError, match="output size"):
        ours(x, [99, 99])


@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d grouped", "conv2d depthwise", "conv_transpose2d"]
)
def test_channels_last_models(name):
    plain, ours, x = twins(name, oracle.ragged)
    for layer in (plain, ours):
        layer.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    outs = [layer(x) for layer in (plain, ours)]
    assert torch.equal(*outs)
    assert outs[1].stride() == outs[0].stride()
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    assert_masked(ours, plain)
    for parameter in ours.parameters():
        assert parameter.grad.stride() == parameter.stride()
