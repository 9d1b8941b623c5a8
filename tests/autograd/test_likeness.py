"""A call is served as the last one only if nothing differs that its plan depends on."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import neq_kernels as neq
from neq_kernels.autograd import eager
from neq_kernels.autograd.likeness import Likeness
from neq_kernels.dispatch.selection import selector
from tests.support.arrange import threads
from tests.support.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="plans use the extension")

IMAGES = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))


class Other(torch.Tensor):
    pass


class Observer(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def operands():
    return IMAGES.clone(), nn.Parameter(torch.ones(6, 4, 3, 3)), nn.Parameter(torch.ones(6))


def test_a_call_with_other_elements_is_like_the_first():
    first, second = operands(), operands()
    assert Likeness(*first).fits(*second)
    assert Likeness(first[0], first[1], None).fits(*second[:2])


OTHER_TENSORS = {
    "shape": lambda x, w, b: (x[:1], w, b),
    "strides": lambda x, w, b: (x.contiguous(memory_format=torch.channels_last), w, b),
    "dtype": lambda x, w, b: (x.double(), w, b),
    "subclass": lambda x, w, b: (x.as_subclass(Other), w, b),
    "meta": lambda x, w, b: (x.to("meta"), w, b),
    "a negative view": lambda x, w, b: (torch._neg_view(x), w, b),
    "inference": lambda x, w, b: (inference(x), w, b),
    "requires_grad": lambda x, w, b: (x.requires_grad_(), w, b),
    "weight's shape": lambda x, w, b: (x, nn.Parameter(w[:, :, :1]), b),
    "weight's strides": lambda x, w, b: (x, replaced(w, torch.channels_last), b),
    "weight's dtype": lambda x, w, b: (x, nn.Parameter(w.double()), b),
    "a weight that is no parameter": lambda x, w, b: (x, w.detach().requires_grad_(), b),
    "a frozen weight": lambda x, w, b: (x, w.requires_grad_(False), b),
    "a frozen bias": lambda x, w, b: (x, w, b.requires_grad_(False)),
    "no bias": lambda x, w, b: (x, w),
}


def inference(t):
    with torch.inference_mode():
        return t.clone()


def replaced(parameter, memory_format):
    parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return parameter


@pytest.mark.parametrize("other", OTHER_TENSORS)
def test_other_tensors_are_not(other):
    likeness = Likeness(*operands())
    assert not likeness.fits(*OTHER_TENSORS[other](*operands()))


def revised():
    selector.revision += 1
    return nullcontext()


OTHER_STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "threads": lambda: threads(2 if torch.get_num_threads() == 1 else 1),
    "revision": revised,
    "a dispatch mode": Observer,
    "forward-mode AD": forward_ad.dual_level,
    "a rehearsal": selector.rehearsal.running,
}


@pytest.mark.parametrize("state", OTHER_STATES)
def test_nor_is_a_call_in_another_state(state):
    likeness, tensors = Likeness(*operands()), operands()
    assert likeness.fits(*tensors)
    with OTHER_STATES[state]():
        assert not likeness.fits(*tensors)


TRANSFORMS = {
    "vmap": lambda function: torch.vmap(function)(torch.ones(2, 3)),
    "grad": lambda function: torch.func.grad(function)(torch.ones(3)),
    "functionalize": lambda function: torch.func.functionalize(function)(torch.ones(3)),
    "trace": lambda function: torch.jit.trace(function, torch.ones(3), check_trace=False),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nor_is_one_in_a_transform_or_a_trace(transform):
    tensors = operands()
    likeness, seen = Likeness(*tensors), []
    assert likeness.fits(*tensors)

    def function(t):
        seen.append(likeness.fits(*tensors))  # of which the transform knows nothing
        return t.sum()

    TRANSFORMS[transform](function)
    assert set(seen) == {False}


def test_autocast_to_another_dtype_is_another_state():
    tensors = operands()
    with torch.autocast("cpu", torch.bfloat16):
        likeness = Likeness(*tensors)
        assert likeness.fits(*tensors)
    assert not likeness.fits(*tensors)
    with torch.autocast("cpu", torch.float16):
        assert not likeness.fits(*tensors)


def test_a_layer_looks_its_plan_up_only_when_a_call_is_unlike_the_last(monkeypatch):
    looked_up = []
    original = eager.call_key

    def spy(*tensors):
        looked_up.append(tuple(tensors[0].shape))
        return original(*tensors)

    monkeypatch.setattr(eager, "call_key", spy)
    layer = neq.convert(nn.Sequential(nn.Conv2d(4, 6, 3)))[0]
    layer.channels.set([0, 2])
    for batch in (2, 2, 1, 1, 2, 2):
        layer(IMAGES[:batch])
    assert looked_up == [(2, 4, 5, 5), (1, 4, 5, 5), (2, 4, 5, 5)]
    layer.channels.set([0, 3])
    layer(IMAGES)
    assert len(looked_up) == 4


def test_a_layer_whose_numbers_were_changed_is_called_with_the_new_ones():
    plain = nn.Conv2d(4, 6, 3)
    layer = neq.convert(nn.Sequential(plain))[0]
    layer.channels.set([0, 2])
    layer(IMAGES)
    layer.stride = (2, 2)
    expected = F.conv2d(IMAGES, layer.weight, layer.bias, stride=2)
    assert torch.equal(layer(IMAGES), expected)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=str)
def test_norms_mask_the_parameters_they_have_now(norm):
    model = neq.convert(nn.Sequential(norm, nn.Conv2d(4, 4, 1)))
    layer = model[0]
    layer.channels.set([1, 3])
    layer(IMAGES)
    assert eager.AFFINE in layer.channels.plans
    for value in (1.0, 2.0, 3.0):
        if value == 2.0:
            layer.weight.data = torch.full((4,), value)
        elif value == 3.0:
            layer.weight = nn.Parameter(torch.full((4,), value))
        model.zero_grad()
        out = layer(IMAGES)
        out.square().sum().backward()
        dense = layer.weight.detach().clone().requires_grad_()
        again = (
            F.batch_norm(IMAGES, None, None, dense, layer.bias.detach(), True)
            if isinstance(norm, nn.BatchNorm2d)
            else F.group_norm(IMAGES, 2, dense, layer.bias.detach())
        )
        torch.testing.assert_close(out, again)
        again.square().sum().backward()
        assert torch.equal(layer.weight.grad[[0, 2]], torch.zeros(2))
        torch.testing.assert_close(layer.weight.grad[[1, 3]], dense.grad[[1, 3]])


def test_a_norm_without_a_shift_is_masked_too():
    layer = neq.convert(nn.Sequential(nn.LayerNorm(5, bias=False), nn.Linear(5, 5)))[0]
    layer.channels.set([1])
    for _ in range(2):
        layer.zero_grad()
        layer(IMAGES).square().sum().backward()
        assert layer.weight.grad.count_nonzero() == 1
