"""FSDP2 and tensor parallel in two processes (gloo): as the same training in one."""

import pytest
import torch
import torch.multiprocessing as mp

from tests.support import sharded_ranks
from tests.support.optimizer_nets import TRANSPOSED


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What a scenario returned on each of two ranks (starting them is slow: all run at once)."""
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(sharded_ranks.run, args=(str(folder),), nprocs=2)
    results = [torch.load(folder / f"results{r}.pt", weights_only=False) for r in range(2)]
    return lambda name: [of_rank[name] for of_rank in results]


def assert_as_the_twin(history):
    assert len(history) == sharded_ranks.N_STEPS
    for ours, expected in history:
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fully_sharded_model_trains_as_a_plain_one(both, rank):
    results = both("fsdp")[rank]
    assert len(results) == 3 + 2 * 3
    for (name, _), (updates, history) in results.items():
        grouped = {layer for layer, groups in TRANSPOSED.items() if groups > 1}
        for parameter, update in updates.items():
            by_rows = name != "RMSprop" and parameter not in grouped
            expected = "torch" if parameter == "gain" else "rows" if by_rows else "guard"
            assert update == expected, (name, parameter)
        assert_as_the_twin(history)


@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_layers_train_as_plain_ones(both, rank):
    for _, history in both("tensor_parallel")[rank].values():
        assert_as_the_twin(history)


def test_a_distributed_checkpoint_holds_the_counts_of_all_neurons(both):
    for saved, loaded in both("checkpoint"):
        counts = saved["linear.weight neq_step"]
        assert counts.tolist() == [2, 1, 1, 1, 2]
        assert torch.equal(counts, loaded["linear.weight neq_step"])
        for key, value in saved.items():
            if " exp_avg" in key:
                assert torch.equal(value, loaded[key])


def test_masks_that_differ_are_found_through_the_groups_store(both):
    for messages in both("different_masks"):
        ((masks, step, message),) = messages[-1:]
        assert (len(masks), step) == (1, 3)
        assert "at step 6 of the optimizer (rank 0; rank 1)" in message
