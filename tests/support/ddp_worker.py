"""Run by torchrun from test_distributed.py: data-parallel training against one process.

Each rank trains on its part of every batch; rank 0 also trains an unwrapped copy on whole batches.
Layers and whole prefixes stop and thaw between steps. Exit status 0: all parameters stayed equal.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.deep = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten())
        self.hidden = nn.Linear(8 * 36, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x * self.scale))
        return self.head(self.hidden(self.deep(x)).relu())


def active_counts(step: str, k: int, position: int, last: bool) -> int:
    if last:
        return max(1, k // 2)
    return {
        "all": k,
        "half": k // 2,
        "none": 0,
        "prefix": 0 if position < 3 else k // 2,
        "middle": 0 if position == 2 else k,
        "norms": 0 if position == 1 else k,
        "stem": k if position == 0 else 0,
    }[step]


SCHEDULE = ("all", "prefix", "none", "half", "none", "middle", "prefix", "norms", "stem", "all")


def set_masks(model: nn.Module, step: str, generator: torch.Generator) -> None:
    layers = list(named_neuron_layers(model))
    for i, (_, layer) in enumerate(layers):
        k = len(layer.channels)
        n = active_counts(step, k, i, i == len(layers) - 1)
        layer.channels.set(torch.randperm(k, generator=generator)[:n])


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor
) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), target).backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--others", default="train")
    parser.add_argument("--optimizer", default="SGD")
    parser.add_argument("--bucket-view", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--static-graph", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = neq.convert(Net().double(), others=args.others)
    single = copy.deepcopy(model)
    options = {"SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}, "AdamW": {"lr": 1e-2}}
    optimizers = []
    for m in (model, single):
        optimizer = getattr(torch.optim, args.optimizer)(m.parameters(), **options[args.optimizer])
        neq.attach(optimizer, m)
        optimizers.append(optimizer)
    wrapped: nn.Module = DistributedDataParallel(
        model, gradient_as_bucket_view=args.bucket_view, static_graph=args.static_graph
    )
    if args.compile:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    data, masks = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    # Under static_graph the first backward decides which parameters are ever reduced.
    for name in SCHEDULE[1:] if args.static_graph else SCHEDULE:
        set_masks(model, name, masks)
        for (_, ours), (_, other) in zip(
            named_neuron_layers(model), named_neuron_layers(single), strict=True
        ):
            other.channels.set(ours.channels.mask)
        x = torch.randn(8, 3, 8, 8, generator=data, dtype=torch.float64)
        target = torch.randn(8, 4, generator=data, dtype=torch.float64)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train_step(wrapped, optimizers[0], x.chunk(world)[rank], target.chunk(world)[rank])
        train_step(single, optimizers[1], x, target)
        expected = dict(single.named_parameters())
        moved = False
        for n, p in model.named_parameters():
            torch.testing.assert_close(p, expected[n], rtol=1e-9, atol=1e-11, msg=f"{name}: {n}")
            moved = moved or not torch.equal(p, before[n])
        assert moved, f"{name}: no parameter moved"
        for layer_name, layer in named_neuron_layers(model):
            for parameter, layout in layer.neuron_parameters():
                suffix = "weight" if parameter is layer.weight else "bias"
                old = before[f"{layer_name}.{suffix}"]
                frozen = layer.channels.frozen
                same = layout.gather(parameter, frozen) == layout.gather(old, frozen)
                assert bool(same.all()), f"{name}: a frozen neuron of {layer_name} moved"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
