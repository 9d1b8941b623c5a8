"""The tests of the ops can fail: each planted fault is caught by one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neq_kernels.backends import aten as module
from neq_kernels.backends.problem import KernelChoice, Strategy
from neq_kernels.dispatch.selection import selector

# These tests are run over the faults.
from tests import test_ops, test_ops_precision
from tests.support import oracle
from tests.support.backends import aten, cpu
from tests.support.op_cases import CONVS, MASKS


def test_allocations_are_poisoned():
    weight = torch.ones(3, 4)
    for fresh in (torch.empty(5), torch.empty_like(weight), weight.new_empty(2, 2)):
        assert bool(fresh.isnan().all())


def planted(monkeypatch, where, name, fault):
    monkeypatch.setattr(where, name, fault(getattr(where, name)))


def off_by_one(scatter_rows):
    """The rows land one neuron further."""

    def wrong(rows, like, order, n, layout):
        return scatter_rows(rows, like, (order + 1) % len(order), n, layout)

    return wrong


def tail_left_as_allocated(scatter_rows):
    """The frozen neurons are never written."""

    def wrong(rows, like, order, n, layout):
        out = torch.empty_like(like)
        layout.scatter_(out, order[:n], layout.rows(rows))
        return out

    return wrong


def one_row_twice(pack):
    """The first active channel is a copy of the second."""

    def wrong(t, order, n, dim):
        return pack(t, torch.cat([order[1:2], order[1:]]), n, dim)

    return wrong


def multiplied(overwrite):
    """Frozen rows are multiplied by zero instead of overwritten."""

    def wrong(grads, layout, frozen):
        keep = torch.ones(layout.n_neurons(grads[1]))
        keep[frozen] = 0
        return grads[0] * keep.view(-1, *[1] * (grads[0].dim() - 1)), grads[1] * keep

    return wrong


def conv_test(case):
    test_ops.test_conv_backward_is_the_dense_one_with_frozen_neurons_at_zero(
        None, case, MASKS["ragged"]
    )


def linear_test():
    test_ops.test_linear_backward_is_the_dense_one_with_frozen_neurons_at_zero(
        None, (4, 3, 7), MASKS["ragged"]
    )


@pytest.mark.parametrize("fault", [off_by_one, tail_left_as_allocated])
def test_planted_faults_in_scatter_are_caught(monkeypatch, fault):
    planted(monkeypatch, aten, "scatter_rows", fault)
    with oracle.forced_backend("aten"):
        with pytest.raises(AssertionError):
            conv_test(CONVS["plain"])
        with pytest.raises(AssertionError):
            linear_test()


def test_a_planted_fault_in_pack_is_caught(monkeypatch):
    planted(monkeypatch, aten, "pack", one_row_twice)
    for case in (CONVS["plain"], CONVS["grouped"]):
        with oracle.forced_backend("aten"), pytest.raises(AssertionError):
            conv_test(case)


def next_channel(backward):
    """The gradients are those of the channels one further."""

    def wrong(*tensors, active, **decided):
        order = (active.order + 1) % len(active.order)
        return backward(*tensors, active=replace(active, order=order), **decided)

    return wrong


def one_channel_short(backward):
    """The last active channel is taken for frozen."""

    def wrong(*tensors, active, **decided):
        return backward(*tensors, active=replace(active, n=active.n - 1), **decided)

    return wrong


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the extension is what is tested")
@pytest.mark.parametrize("fault", [next_channel, one_channel_short])
@pytest.mark.parametrize("strategy", [Strategy.DENSE, Strategy.PACK, Strategy.CUSTOM])
def test_planted_faults_in_the_leaf_ops_are_caught(monkeypatch, fault, strategy):
    monkeypatch.setattr(selector, "choice", lambda *_: KernelChoice(strategy))
    conv_test(CONVS["plain"])
    linear_test()
    planted(monkeypatch, cpu, "conv_backward", fault)
    planted(monkeypatch, cpu, "linear_backward", fault)
    with pytest.raises(AssertionError):
        conv_test(CONVS["plain"])
    with pytest.raises(AssertionError):
        linear_test()


def summed_in_one_chain(linear_wgrad):
    """The reduction of the weight gradient is one long chain of additions."""

    def wrong(grad_output, input, want):
        rows, bias = linear_wgrad(grad_output[:4], input[:4], want)
        for dy, x in zip(grad_output[4:].split(4), input[4:].split(4), strict=True):
            more, more_bias = linear_wgrad(dy, x, want)
            rows, bias = rows + more, bias + more_bias
        return rows, bias

    return wrong


def test_a_careless_sum_is_caught(monkeypatch):
    planted(monkeypatch, module, "_linear_wgrad", summed_in_one_chain)
    with oracle.forced_backend("aten"), pytest.raises(AssertionError, match="allowed"):
        test_ops_precision.test_linear_error_over_a_long_reduction(None, None)


def test_rows_multiplied_instead_of_overwritten_are_caught(monkeypatch):
    planted(monkeypatch, module, "_overwrite_frozen", multiplied)
    with oracle.forced_backend("aten"), pytest.raises(AssertionError):
        test_ops.test_nan_and_inf_in_frozen_channels_reach_nothing(None, "all but one", torch.nan)
