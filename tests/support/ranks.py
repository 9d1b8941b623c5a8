"""What each of two processes runs in test_distributed.py."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import neq_kernels as neq
from neq_kernels.controllers import FixedController, NEqController, StochasticController
from tests.support.nets import conv_net, images, picture, train, wiggle
from tests.support.scenarios import run_all


def run(rank: int, folder: str) -> None:
    """Run every scenario as rank ``rank`` of 2; the results go to a file."""
    run_all(rank, folder, SCENARIOS)


def shards(rank: int) -> list[torch.Tensor]:
    """Three batches of rank 0 and two of rank 1."""
    every = images(5)
    return every[:3] if rank == 0 else every[3:]


def facts(model: torch.nn.Module, controller) -> dict[str, object]:
    found = picture(model)
    result = {"masks": found["masks"], "generations": found["generations"]}
    if isinstance(controller, NEqController):
        result |= {"phi": controller.response.phi, "velocity": controller.response.velocity}
        result |= {"outputs": controller.outputs, "state": controller.state_dict()}
    return result


def sharded_probe(rank: int) -> object:
    """φ of a sharded probe; the model is replicated and moves the same way on both ranks."""
    results = {}
    for similarity in ("neuron", "sample"):
        for memory in ("snapshot", "activations"):
            torch.manual_seed(0)
            model = conv_net()
            controller = NEqController(
                DistributedDataParallel(model),
                shards(rank),
                eps=3e-4,
                similarity=similarity,
                memory=memory,
            )
            steps = []
            for epoch in range(3):
                train(model, images(), seed=epoch)
                controller.step()
                steps.append(facts(model, controller))
            results[similarity, memory] = steps
    return results


def one_empty_shard(rank: int) -> object:
    model = conv_net()
    controller = NEqController(model, images(2) if rank else [])
    wiggle(model)
    controller.step()
    return facts(model, controller)


def rank_zero_decides(rank: int) -> object:
    """Models and seeds that differ: φ is the sum's, the masks are rank 0's."""
    results = []
    model = conv_net()
    controller = StochasticController(model, 0.5, seed=rank, warmup=0)
    results.append(facts(model, controller))
    controller.step()
    results.append(facts(model, controller))
    FixedController(model, {"0": [rank, 4]})
    results.append(facts(model, controller))
    controller = NEqController(model, images(), eps=1e-3 if rank == 0 else 10.0)
    wiggle(model)
    controller.step()
    results.append(facts(model, controller))
    return results


def changed_probe_on_one_rank(rank: int) -> object:
    model = conv_net()
    probe = shards(rank)
    controller = NEqController(model, probe, eps=1e-3)
    wiggle(model)
    good = list(probe)
    if rank == 1:
        probe.reverse()
    before = picture(model)
    message = error_of(controller.step)
    unchanged = picture(model) == before and not controller.history
    probe[:] = good
    controller.step()
    return {"message": message, "unchanged": unchanged, **facts(model, controller)}


def bad_probe_on_one_rank(rank: int) -> object:
    return error_of(lambda: NEqController(conv_net(), [3] if rank == 0 else images()))


def empty_everywhere(rank: int) -> object:
    return error_of(lambda: NEqController(conv_net(), []))


def resumed_from_rank_zero(rank: int) -> object:
    """Rank 0's snapshot state serves both ranks."""
    model = conv_net()
    controller = NEqController(model, shards(rank), eps=3e-4)
    for epoch in range(2):
        train(model, images(), seed=epoch)
        controller.step()
    box = [(deepcopy(model.state_dict()), controller.state_dict())]
    dist.broadcast_object_list(box, src=0)
    train(model, images(), seed=2)
    controller.step()
    straight = facts(model, controller)
    torch.manual_seed(1)
    again = conv_net()
    resumed = NEqController(again, shards(rank), eps=3e-4)
    again.load_state_dict(box[0][0])
    resumed.load_state_dict(box[0][1])
    train(again, images(), seed=2)
    resumed.step()
    return {"straight": straight, "resumed": facts(again, resumed)}


def sharded_parameters(rank: int) -> object:
    """FSDP2: the snapshot is refused, stored activations serve."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = neq.convert(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)))
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    probe = [torch.ones(3, 6) * (rank + 1)]
    message = error_of(lambda: NEqController(model, probe, outputs=["1"]))
    controller = NEqController(model, probe, memory="activations", eps=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    controller.step()
    return {"message": message, "phi": controller.response.phi, "outputs": controller.outputs}


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


SCENARIOS = (
    sharded_probe,
    one_empty_shard,
    rank_zero_decides,
    changed_probe_on_one_rank,
    bad_probe_on_one_rank,
    empty_everywhere,
    resumed_from_rank_zero,
    sharded_parameters,
)
