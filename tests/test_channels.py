"""ActiveChannels and NeuronLayout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neq_kernels import ActiveChannels, NeuronLayout
from neq_kernels.channels import WHOLE_PARAMETER
from tests.support import oracle


def state(channels):
    """Everything kernels and users can read."""
    return (
        channels.mask.tolist(),
        channels.n_active,
        channels.active.tolist(),
        channels.frozen.tolist(),
        channels.order().tolist(),
        channels.count().tolist(),
        channels.host_count.tolist(),
    )


def test_everything_is_active_at_first():
    channels = ActiveChannels(3)
    assert state(channels) == ([True] * 3, 3, [0, 1, 2], [], [0, 1, 2], [3], [3, 0])
    assert channels.generation == 0
    assert not channels.none_active


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_set_derives_everything_from_the_mask(mask):
    channels = oracle.channels_with(mask)
    active = [i for i, on in enumerate(mask) if on]
    frozen = [i for i, on in enumerate(mask) if not on]
    is_run = bool(active) and active == list(range(active[0], active[-1] + 1))
    n = len(active)
    assert state(channels) == (
        mask,
        n,
        active,
        frozen,
        active + frozen,
        [n],
        [n, active[0] if is_run else -1],
    )
    assert channels.none_active == (n == 0)
    assert len(channels) == len(mask)


def test_dtypes_devices_and_sizes_of_what_kernels_read():
    channels = oracle.channels_with([True, False, True])
    assert channels.mask.dtype == torch.bool
    assert channels.order().dtype == torch.int64
    assert channels.count().dtype == torch.int32
    assert channels.host_count.dtype == torch.int32
    assert channels.order().shape == (3,)
    assert channels.count().shape == (1,)
    assert channels.host_count.shape == (2,)
    for tensor in (channels.mask, channels.order(), channels.count(), channels.host_count):
        assert tensor.device.type == "cpu"


def test_addresses_never_change():
    channels = ActiveChannels(5)
    tensors = (channels.order(), channels.count(), channels.host_count)
    before = [t.data_ptr() for t in tensors]
    for mask in ([False] * 5, [True, False, True, False, True], [True] * 5):
        channels.set(mask)
        after = (channels.order(), channels.count(), channels.host_count)
        assert [t.data_ptr() for t in after] == before
        assert all(a is b for a, b in zip(after, tensors, strict=True))


def test_dense_kernels_serve_until_one_of_several_changes():
    together = [ActiveChannels(4), ActiveChannels(3)]
    part, cpu = together[0].part(0, 2), torch.device("cpu")
    for channels in together:
        channels.serve_densely(together)
    late = together[1].part(1, 3)
    every = [*together, part, late]
    assert all(channels.served_densely and channels.on(cpu).dense for channels in every)
    together[1].set([True] * 3)  # no change
    assert all(channels.served_densely for channels in every)
    together[1].set([0])
    assert not any(channels.served_densely or channels.on(cpu).dense for channels in every)


def test_what_was_planned_for_either_way_is_kept_until_the_set_changes():
    channels = ActiveChannels(4)
    channels.plans["key"] = "chosen"
    for _ in range(2):
        channels.serve_densely([channels])
        assert channels.plans.setdefault("key", "dense") == "dense"
        channels.serve_densely(())
        assert channels.plans["key"] == "chosen"
    channels.set([1])
    assert not channels.plans
    channels.serve_densely([channels])
    assert not channels.plans


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_is_not_served_densely(copied):
    channels, other = ActiveChannels(4), ActiveChannels(4)
    channels.part(0, 2)
    channels.serve_densely([channels, other])
    again = copied(channels)
    assert not again.served_densely
    assert not again.on(torch.device("cpu")).dense
    assert not again.part(0, 2).served_densely
    again.set([1])
    assert channels.served_densely


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unsorted_indices(dtype):
    channels = ActiveChannels(5)
    channels.set(torch.tensor([4, 0, 2], dtype=dtype))
    assert channels.mask.tolist() == [True, False, True, False, True]
    assert channels.active.tolist() == [0, 2, 4]


def test_sequences_are_taken_too():
    channels = ActiveChannels(3)
    channels.set([2, 0])
    assert channels.mask.tolist() == [True, False, True]
    channels.set([False, True, False])
    assert channels.mask.tolist() == [False, True, False]
    channels.set([])
    assert channels.n_active == 0
    channels.set(range(3))
    assert channels.n_active == 3


def test_the_mask_is_a_copy_both_ways():
    channels = ActiveChannels(3)
    given_mask = torch.tensor([True, False, True])
    channels.set(given_mask)
    given_mask.fill_(False)
    channels.mask.fill_(False)
    assert channels.mask.tolist() == [True, False, True]


def test_generation_counts_real_changes_only():
    channels = ActiveChannels(3)
    channels.set([True, True, True])
    channels.set([0, 1, 2])
    channels.reset()
    assert channels.generation == 0
    channels.set([1])
    assert channels.generation == 1
    channels.set([False, True, False])
    assert channels.generation == 1
    channels.reset()
    assert channels.generation == 2
    assert channels.n_active == 3


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([True, False], ValueError, r"mask: expected length 3, got 2"),
        ([True] * 4, ValueError, r"mask: expected length 3, got 4"),
        ([0, 3], ValueError, r"indices: expected 0 <= index < 3, got 0\.\.3"),
        ([-1, 2], ValueError, r"indices: expected 0 <= index < 3, got -1\.\.2"),
        ([1, 1], ValueError, r"indices: expected no duplicates, got \[1, 1\]"),
        (torch.ones(3), TypeError, r"expected bool, int32 or int64, got torch\.float32"),
        (torch.ones(3, dtype=torch.uint8), TypeError, r"expected bool, int32 or int64, got .*int8"),
        (torch.ones(3, 1, dtype=torch.bool), ValueError, r"one dimension, got shape \(3, 1\)"),
        (torch.tensor(True), ValueError, r"one dimension, got shape \(\)"),
        ([0.5, 0.5, 0.5], TypeError, r"expected bool, int32 or int64, got torch\.float32"),
    ],
)
def test_bad_masks_raise_and_change_nothing(value, error, message):
    channels = oracle.channels_with([True, False, True])
    before, generation = state(channels), channels.generation
    with pytest.raises(error, match=message):
        channels.set(value)
    assert state(channels) == before
    assert channels.generation == generation


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-2, ValueError, "at least 1, got -2"),
        (2.0, TypeError, "expected an int, got float"),
        (True, TypeError, "expected an int, got bool"),
    ],
)
def test_bad_sizes_raise(value, error, message):
    with pytest.raises(error, match=message):
        ActiveChannels(value)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(copied):
    channels = oracle.channels_with([True, False, True, True])
    twin = copied(channels)
    assert state(twin) == state(channels)
    assert twin.generation == channels.generation
    twin.set([0])
    assert channels.n_active == 3
    assert twin.order().tolist() == [0, 1, 2, 3]
    channels.set([1, 2])
    assert twin.active.tolist() == [0]


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        channels = ActiveChannels(4)
        channels.set([False, True, True, False])
        assert channels.mask.device.type == "cpu"
        channels.set([3, 1])
        channels.set(torch.tensor([False, False, True, True], device="cpu"))
        channels.set([])
        channels.reset()
        channels.set([2])
    assert state(channels) == (
        [False, False, True, False],
        1,
        [2],
        [0, 1, 3],
        [2, 0, 1, 3],
        [1],
        [1, 2],
    )


def test_inference_mode_does_not_matter():
    with torch.inference_mode():
        channels = ActiveChannels(3)
        channels.set([0, 2])
    channels.set([1])
    with torch.inference_mode():
        channels.set([2])
    channels.order().clone()
    assert channels.active.tolist() == [2]
    assert not channels.order().is_inference()


def test_repr_says_how_many_are_active():
    assert repr(oracle.channels_with([True, False, True])) == "ActiveChannels(active=2/3)"


# --- NeuronLayout --------------------------------------------------------------------------------


def layouts():
    """(layout, parameter, transposed, groups) for every kind of parameter."""
    rows = NeuronLayout()
    yield rows, torch.randn(6), False, 1
    yield rows, torch.randn(6, 5), False, 1
    yield rows, torch.randn(6, 5, 3, 2), False, 1
    yield rows, torch.randn(6, 5, 3, 2).to(memory_format=torch.channels_last), False, 1
    yield rows, torch.randn(6, 2, 3, 2, 2).to(memory_format=torch.channels_last_3d), False, 1
    yield rows, torch.randn(5, 6).t(), False, 1
    yield NeuronLayout(1, axis=1), torch.randn(4, 6, 3), True, 1
    yield NeuronLayout(2, axis=1), torch.randn(4, 3, 3, 2), True, 2
    yield (
        NeuronLayout(2, axis=1),
        torch.randn(4, 3, 3, 2).to(memory_format=torch.channels_last),
        True,
        2,
    )
    yield NeuronLayout(6, axis=1), torch.randn(6, 1, 2, 2), True, 6


@pytest.mark.parametrize("case", list(layouts()), ids=lambda c: f"{c[0]}-{tuple(c[1].shape)}")
class TestNeuronLayout:
    def test_counts_neurons(self, case):
        layout, parameter, _, _ = case
        assert layout.n_neurons(parameter) == 6

    def test_gather_and_scatter_reach_the_neurons_of_the_definition(self, case):
        layout, parameter, transposed, groups = case
        chosen = [4, 0, 3]
        gathered = layout.gather(parameter, torch.tensor(chosen))
        for i, k in enumerate(chosen):
            expected = oracle.neuron(parameter, k, transposed=transposed, groups=groups)
            assert torch.equal(gathered[i], expected)
        target = torch.zeros_like(parameter)
        layout.scatter_(target, torch.tensor(chosen), gathered)
        expected = oracle.zero_frozen(
            parameter, [k in chosen for k in range(6)], transposed=transposed, groups=groups
        )
        assert torch.equal(target, expected)

    def test_fill_touches_nothing_else(self, case):
        layout, parameter, transposed, groups = case
        target = parameter.clone()
        layout.fill_(target, torch.tensor([1, 5]), 0)
        expected = oracle.zero_frozen(
            parameter, [k not in (1, 5) for k in range(6)], transposed=transposed, groups=groups
        )
        assert torch.equal(target, expected)

    def test_blocks_describe_memory(self, case):
        """Each element of a neuron lies at the offset the description says."""
        layout, parameter, transposed, groups = case
        blocks = layout.blocks(parameter)
        if blocks is None:
            assert not parameter.is_contiguous()
            assert parameter.dim() < 3
            return
        n_groups, outer, per_group, inner = blocks
        assert n_groups * outer * per_group * inner == parameter.numel()
        memory = parameter.as_strided((parameter.numel(),), (1,), parameter.storage_offset())
        for k in range(6):
            group, j = divmod(k, per_group)
            described = [
                memory[((group * outer + o) * per_group + j) * inner + i].item()
                for o in range(outer)
                for i in range(inner)
            ]
            row = oracle.neuron(parameter, k, transposed=transposed, groups=groups)
            assert sorted(described) == sorted(row.flatten().tolist())


def test_the_whole_parameter_is_one_neuron():
    parameter = torch.randn(3, 4)
    assert WHOLE_PARAMETER.n_neurons(parameter) == 1
    assert torch.equal(WHOLE_PARAMETER.gather(parameter, torch.tensor([0]))[0], parameter)
    assert WHOLE_PARAMETER.blocks(parameter) == (1, 1, 1, 12)
    WHOLE_PARAMETER.fill_(parameter, torch.tensor([0]), 0)
    assert bool((parameter == 0).all())


def test_blocks_of_memory_that_is_not_dense_are_none():
    assert NeuronLayout().blocks(torch.randn(6, 8)[:, ::2]) is None
    assert NeuronLayout().blocks(torch.randn(6, 4, 3, 3).permute(0, 2, 1, 3)) is None
    assert NeuronLayout().blocks(torch.randn(1, 4).expand(6, 4)) is None


def test_a_part_follows_the_whole():
    channels = ActiveChannels(6)
    channels.set([0, 3, 4])
    part = channels.part(2, 5)
    assert channels.part(2, 5) is part
    assert part.active.tolist() == [1, 2]
    assert (part.n_active, part.start, part.generation) == (2, 1, 1)
    order = part.order("cpu")
    channels.set([2, 5])
    assert part.active.tolist() == [0]
    assert order.tolist() == [0, 1, 2]
    generation = part.generation
    channels.set([2])  # changes no channel of the part
    assert part.generation == generation
    channels.set([])
    assert part.none_active
    copied = copy.deepcopy(channels)
    copied.reset()
    assert copied.part(2, 5).n_active == 3
    assert part.none_active
