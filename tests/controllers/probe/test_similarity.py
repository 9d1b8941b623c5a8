"""φ from two outputs: against numbers worked by hand and against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neq_kernels.controllers.probe.similarity import NeuronSimilarity, SampleSimilarity, cosine


def phi(similarity, *batches, dim):
    """φ of a probe whose batches are lists of (old, new) calls."""
    total = similarity()
    for calls in batches:
        for old, new in calls:
            total.add(old, new, dim)
        total.end_batch()
    return similarity.phi(total.sums())


def one_cosine(a, b):
    norms = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    zeros = [n <= 1e-8 for n in norms]
    if any(zeros):
        return float(all(zeros))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms[0] / norms[1]


def test_neuron_is_one_vector_over_samples_and_positions():
    # Neuron 0: (3, 0, 0, 4) against (0, 0, 0, 4): 16 / (5 * 4). Neuron 1: (1, 1) twice, turned.
    old = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 4.0], [1.0, 1.0]]])
    new = torch.tensor([[[0.0, 0.0], [1.0, -1.0]], [[0.0, 4.0], [-1.0, 1.0]]])
    assert phi(NeuronSimilarity, [(old, new)], dim=1).tolist() == [0.8, 0.0]


def test_sample_is_the_mean_of_a_cosine_per_sample():
    # Neuron 0: sample 0 (3, 0) against (0, 0): 0; sample 1 (0, 4) against (0, 4): 1.
    # Neuron 1: (1, 1) against (1, -1) and (-1, 1): 0 twice.
    old = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 4.0], [1.0, 1.0]]])
    new = torch.tensor([[[0.0, 0.0], [1.0, -1.0]], [[0.0, 4.0], [-1.0, 1.0]]])
    assert phi(SampleSimilarity, [(old, new)], dim=1).tolist() == [0.5, 0.0]


def test_sample_of_a_flat_output_compares_signs():
    old, new = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[5.0, -1.0], [2.0, 0.0]])
    assert phi(SampleSimilarity, [(old, new)], dim=1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([1e-9, 0.0], [0.0, -1e-9], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-7, 0.0], [-1e-7, 0.0], -1.0),
        ([1e-9, 0.0], [1.0, 0.0], 0.0),
        ([math.nan, 1.0], [1.0, 1.0], 0.0),
        ([math.inf, 1.0], [1.0, 1.0], 0.0),
    ],
)
@pytest.mark.parametrize("similarity", [NeuronSimilarity, SampleSimilarity])
def test_edges(similarity, old, new, expected):
    old, new = torch.tensor([[old]]).double(), torch.tensor([[new]]).double()
    assert phi(similarity, [(old, new)], dim=1).tolist() == [expected]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9))
def test_equal_outputs_give_exactly_one(values):
    output = torch.tensor([[values]])
    assert phi(NeuronSimilarity, [(output, output.clone())], dim=1).tolist() == [1.0]
    assert phi(SampleSimilarity, [(output, output.clone())], dim=1).tolist() == [1.0]


def test_never_beyond_one():
    sums = torch.tensor([1.0 + 1e-15, 1.0, 1.0], dtype=torch.float64)
    assert cosine(*sums).item() == 1.0
    assert cosine(-sums[0], sums[1], sums[2]).item() == -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((4, 3), 1), ((4, 5, 3), 2), ((4, 3, 5), 1), ((4, 3, 2, 5), 1), ((2, 4, 5, 3), 3)],
)
def test_against_loops(shape, dim, dtype):
    old, new = (torch.randn(shape).to(dtype) for _ in range(2))
    neuron, sample = [], []
    for k in range(3):
        a, b = old.select(dim, k).double(), new.select(dim, k).double()
        neuron.append(one_cosine(a.flatten().tolist(), b.flatten().tolist()))
        per_sample = [
            one_cosine(x.flatten().tolist(), y.flatten().tolist())
            for x, y in zip(a, b, strict=True)
        ]
        sample.append(sum(per_sample) / len(per_sample))
    found = phi(NeuronSimilarity, [(old, new)], dim=dim)
    assert found.tolist() == pytest.approx(neuron, abs=1e-12)
    found = phi(SampleSimilarity, [(old, new)], dim=dim)
    assert found.tolist() == pytest.approx(sample, abs=1e-12)


@pytest.mark.parametrize("similarity", [NeuronSimilarity, SampleSimilarity])
def test_batches_add_up_whatever_their_size(similarity):
    old, new = torch.randn(7, 3, 4).double(), torch.randn(7, 3, 4).double()
    whole = phi(similarity, [(old, new)], dim=1)
    parts = [[(old[a:b], new[a:b])] for a, b in ((0, 4), (4, 4), (4, 7))]
    assert phi(similarity, *parts, dim=1).tolist() == pytest.approx(whole.tolist(), abs=1e-12)


def test_calls_in_one_forward_are_parts_of_one_vector():
    # Per sample (3, 4) against (3, 0): 9 / 15, not the mean of 1 and 0.
    calls = [
        (torch.tensor([[3.0]]), torch.tensor([[3.0]])),
        (torch.tensor([[4.0]]), torch.tensor([[0.0]])),
    ]
    for similarity in (NeuronSimilarity, SampleSimilarity):
        assert phi(similarity, calls, dim=1).tolist() == pytest.approx([0.6])
        assert phi(similarity, calls[:1], calls[1:], dim=1).tolist() == pytest.approx(
            [0.6 if similarity is NeuronSimilarity else 0.5]
        )


@pytest.mark.parametrize("similarity", [NeuronSimilarity, SampleSimilarity])
def test_an_output_without_batch_dimension_is_one_sample(similarity):
    old, new = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    expected = phi(similarity, [(old[None], new[None])], dim=1)
    assert torch.equal(phi(similarity, [(old, new)], dim=0), expected)
