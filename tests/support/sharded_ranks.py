"""What each of two processes runs in test_sharded.py: sharded training beside a plain twin's."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import neq_kernels as neq
from neq_kernels.optim import agreement
from tests.support.optimizer_nets import layers, make_net, random_masks
from tests.support.scenarios import run_all

MAKE = {
    "SGD": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD dampening": lambda ps: SGD(ps, lr=0.05, momentum=0.9, dampening=0.5),
    "Adam": lambda ps: Adam(ps, lr=0.05, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda ps: AdamW(ps, lr=0.05),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.05, weight_decay=0.1),
}
N_STEPS = 5


def run(rank: int, folder: str) -> None:
    """Run every scenario as rank ``rank`` of 2; the results go to a file."""
    scenarios = (fsdp, tensor_parallel, checkpoint, different_masks)
    run_all(rank, folder, scenarios, folder)


def net_of_layers() -> nn.Module:
    net = make_net()
    net.gain = nn.Parameter(net.gain.detach().reshape(1))  # fully_shard refuses scalars
    return net


def fully_sharded(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in net.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def facts(net: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, p in net.named_parameters():
        found[name] = whole(p.detach()).clone()
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = whole(value).clone()
    return found


def train(net: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def beside_a_twin(name: str, state: str, net: nn.Module, twin: nn.Module, x: Tensor) -> object:
    """(what the sharded and the plain model are) after each step."""
    pair, history = [], []
    for model in (net, twin):
        optimizer = MAKE[name](model.parameters())
        handle = neq.attach(optimizer, model, state)
        pair.append((model, optimizer))
        if model is net:
            updates = {update.name: update.update for update in handle.report()}
    generator = torch.Generator().manual_seed(1)
    for i in range(N_STEPS):
        if i:
            random_masks(net, generator)
            if name != "RMSprop" and hasattr(net, "grouped_up"):
                # In shards it takes the guard, which keeps its state and counts no neurons.
                net.grouped_up.channels.reset()
            for ours, other in zip(layers(net).values(), layers(twin).values(), strict=True):
                other.channels.set(ours.channels.mask)
        for model, optimizer in pair:
            train(model, optimizer, x)
        history.append([facts(*one) for one in pair])
    return updates, history


def fsdp(rank: int, folder: str) -> object:
    results = {}
    for name in MAKE:
        for state in ("reset", "keep", "reference") if name.startswith("Adam") else ("reset",):
            net, twin = fully_sharded(net_of_layers()), net_of_layers()
            x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
            dist.broadcast(x, 0)
            results[name, state] = beside_a_twin(name, state, net, twin, x)
    return results


def tensor_parallel(rank: int, folder: str) -> object:
    results = {}
    for name in ("AdamW", "RMSprop"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4))
        net = neq.convert(net.double())
        twin = copy.deepcopy(net)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(net, init_device_mesh("cpu", (2,)), plan)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
        results[name] = beside_a_twin(name, "reset", net, twin, x)
    return results


def checkpoint(rank: int, folder: str) -> object:
    """Counts of neurons in both processes, through a distributed checkpoint."""
    saved, loaded = None, None
    for is_resumed in (False, True):
        net = fully_sharded(net_of_layers())
        optimizer = MAKE["Adam"](net.parameters())
        neq.attach(optimizer, net, "keep")
        x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
        if not is_resumed:
            train(net, optimizer, x)
            layers(net)["linear"].channels.set([0, 4])
            train(net, optimizer, x)
            saved = facts(net, optimizer)
            state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
            dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
        else:
            state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
            dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
            set_optimizer_state_dict(net, optimizer, state["optimizer"])
            loaded = facts(net, optimizer)
    return saved, loaded


def different_masks(rank: int, folder: str) -> object:
    """The default group's own store."""
    agreement.INTERVAL = 2
    net = neq.convert(nn.Sequential(nn.Linear(2, 3)))
    optimizer = SGD(net.parameters(), lr=0.1)
    neq.attach(optimizer, net)
    messages = []
    for masks in ([0], [rank]):
        net[0].channels.set(masks)
        for i in range(4):
            if i % 2:
                dist.barrier()  # as a backward would
            try:
                optimizer.step()
            except RuntimeError as error:
                messages.append((masks, i, str(error)))
    return messages
