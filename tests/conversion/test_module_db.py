"""PyTorch's own database of modules: every input of every layer that can be converted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.comparison import (
    FLOAT64,
    Example,
    freeze_half,
    gradient_faults,
    same,
    seed,
    weighted_sum,
)
from neq_kernels.conversion.convert import convert
from neq_kernels.conversion.neuron_classes import neuron_class
from tests.support.torch_databases import ModuleInfo, module_db

CONVERTED = (
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Conv1d", "Conv2d", "Conv3d"),
    *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "LazyConv1d", "LazyConv2d"),
    *("LazyConv3d", "LazyConvTranspose1d", "LazyConvTranspose2d", "LazyConvTranspose3d"),
    *("Linear", "GroupNorm", "LayerNorm", "TransformerEncoder", "TransformerEncoderLayer"),
    *("TransformerDecoderLayer", "Transformer", "Bilinear", "RMSNorm"),
    *("Embedding", "MultiheadAttention"),
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
)
INFOS = {info.module_cls.__name__: info for info in module_db}


def examples(info: ModuleInfo, training: bool) -> Iterator[Example]:
    """Plain modules, and their inputs."""
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    for sample in inputs:
        made, called = sample.constructor_input, sample.forward_input
        seed()
        module = info.module_cls(*made.args, **made.kwargs).to(torch.float64).train(training)
        example = Example(module, called.args, called.kwargs)
        with torch.no_grad():  # lazy layers become what they are
            example.forward(module)
        yield example


def converted(module: nn.Module) -> nn.Module | None:
    """None where the input's options leave nothing to learn, such as ``affine=False``."""
    try:
        return convert(copy.deepcopy(module))
    except ValueError:
        return None


def wanted(module: nn.Module, example: Example) -> list[torch.Tensor]:
    """Outputs, and the gradients of the inputs."""
    given = [
        t
        for t in torch.utils._pytree.tree_leaves((example.args, example.kwargs))
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    outputs = example.forward(module)
    gradients = torch.autograd.grad(
        weighted_sum(outputs), [*given, *learning(module)], allow_unused=True
    )
    for parameter, gradient in zip(learning(module), gradients[len(given) :], strict=True):
        parameter.grad = gradient
    return [*outputs, *(torch.zeros(()) if g is None else g for g in gradients[: len(given)])]


def learning(module: nn.Module) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CONVERTED)
def test_active_neurons_are_as_dense_and_frozen_ones_have_no_gradient(name, training):
    count = 0
    for example in examples(INFOS[name], training):
        model = converted(example.model)
        if model is None:
            continue
        count += 1
        want = example.forward(example.model)
        assert same(want, example.forward(model))
        frozen = freeze_half(model)
        # The input gradients are sums in another order.
        dense, ours = wanted(example.model, example), wanted(model, example)
        assert same(dense[: len(want)], ours[: len(want)])
        for a, b in zip(dense[len(want) :], ours[len(want) :], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
        assert not gradient_faults(example.model, model, frozen, FLOAT64)
    assert count


def test_no_type_of_the_database_is_left_out():
    known = {name for name, info in INFOS.items() if neuron_class(info.module_cls) is not None}
    assert known <= set(CONVERTED)
