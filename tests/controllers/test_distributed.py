"""Two processes (gloo): one decision, whatever each rank sees."""

import pytest
import torch
import torch.multiprocessing as mp

from neq_kernels.controllers import NEqController
from tests.support import ranks
from tests.support.nets import assert_same, conv_net, images, train


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What a scenario returned on each of two ranks (starting them is slow: all run at once)."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(ranks.run, args=(str(folder),), nprocs=2)
    results = [torch.load(folder / f"results{r}.pt", weights_only=False) for r in range(2)]
    return lambda name: [of_rank[name] for of_rank in results]


def test_a_sharded_probe_is_one_probe(both):
    results = both("sharded_probe")
    for (similarity, memory), steps in results[0].items():
        torch.manual_seed(0)
        model = conv_net()
        controller = NEqController(model, images(5), eps=3e-4, similarity=similarity)
        for epoch, step in enumerate(steps):
            train(model, images(), seed=epoch)
            controller.step()
            alone = ranks.facts(model, controller)
            other = results[1][similarity, memory][epoch]
            for key in ("masks", "generations", "phi", "velocity", "outputs"):
                assert_same(other[key], step[key])
            assert step["masks"] == alone["masks"]
            for name, phi in alone["phi"].items():
                assert step["phi"][name].tolist() == pytest.approx(phi.tolist(), abs=1e-6)
        assert len({str(step["masks"]) for step in steps}) > 1


def test_a_rank_may_have_nothing_to_probe(both):
    a, b = both("one_empty_shard")
    for key in ("masks", "generations", "phi", "velocity", "outputs"):
        assert_same(a[key], b[key])
    assert bool((a["phi"]["9"] < 1).any())
    assert a["outputs"] == ["9"]


def test_rank_zero_decides(both):
    a, b = both("rank_zero_decides")
    for one, other in zip(a, b, strict=True):
        assert one["masks"] == other["masks"]
        assert one["generations"] == other["generations"]
    assert a[2]["masks"]["0"] == [True, False, False, False, True, False]
    assert any(a[3]["masks"]["3"])


def test_a_probe_changed_on_one_rank_stops_all_and_loses_nothing(both):
    a, b = both("changed_probe_on_one_rank")
    assert b["message"].startswith("ValueError: probe: batch 0 is not the one of the last pass")
    assert a["message"].startswith("RuntimeError: another rank failed; rank 1: ValueError: probe")
    assert a["unchanged"]
    assert b["unchanged"]
    assert_same(a["phi"], b["phi"])
    assert a["masks"] == b["masks"]


def test_a_constructor_that_fails_on_one_rank_fails_on_all(both):
    a, b = both("bad_probe_on_one_rank")
    assert a.startswith("ValueError: probe: expected batches that are")
    assert b.startswith("RuntimeError: another rank failed; rank 0: ValueError: probe")


def test_a_probe_that_is_empty_on_all_ranks(both):
    for message in both("empty_everywhere"):
        assert message.startswith("ValueError: probe: expected at least one batch")


def test_rank_zeros_state_resumes_all(both):
    for result in both("resumed_from_rank_zero"):
        for key in ("masks", "phi", "velocity"):
            assert_same(result["resumed"][key], result["straight"][key])


def test_sharded_parameters(both):
    for result in both("sharded_parameters"):
        assert (
            "memory: 'snapshot' does not support this model (its parameters are sharded)"
            in (result["message"])
        )
        assert result["outputs"] == ["1"]
        assert bool((result["phi"]["0"] == -1).all())
