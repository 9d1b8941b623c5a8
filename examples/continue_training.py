"""Where NEq pays: training that continues from good weights, timed against dense training.

    python examples/continue_training.py

A small network is trained for a while. Then two copies of it continue from the same weights, on the
same batches, with a small learning rate: one dense, one with NEq. They take turns step by step, so
that whatever else the machine does falls on both. Everything printed was measured in this run; on a
machine that does something else at the time the speed-up says little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neq_kernels as neq

DATA = Path(__file__).parents[1] / "benchmarks" / "training" / "data" / "fashion_mnist_12k.npz"


class Trainer:
    """One model with its optimizer, and the seconds of each of its steps."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.scheduler.step()

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        correct = (self.model(x).argmax(1) == y).float().mean().item()
        self.model.train()
        return correct


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 7 * 7, 10))


def load(images: int) -> dict[str, Tensor]:
    """Balanced subsets: every prefix of ten images holds each class once."""
    with np.load(DATA) as arrays:
        raw = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "classes"}
    inputs = {name: (raw[name].float().unsqueeze(1) / 255 - 0.286) / 0.353 for name in raw}
    return {
        "train_x": inputs["train_x"][:images],
        "train_y": raw["train_y"][:images].long(),
        # The probe is not tested on.
        "probe": inputs["test_x"][:50],
        "test_x": inputs["test_x"][50:1050],
        "test_y": raw["test_y"][50:1050].long(),
    }


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=positive, default=3, help="epochs before (3)")
    parser.add_argument("--epochs", type=positive, default=5, help="epochs of each copy (5)")
    parser.add_argument("--images", type=positive, default=1000, help="training images (1000)")
    parser.add_argument("--batch", type=positive, default=50)
    parser.add_argument("--lr", type=float, default=0.01, help="of the continued training (0.01)")
    given = parser.parse_args(arguments)
    if not given.lr > 0:
        parser.error(f"--lr: expected a number above 0, got {given.lr}")

    torch.manual_seed(0)
    data = load(given.images)

    def batches() -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(data["train_x"])).split(given.batch)
        return [(data["train_x"][indices], data["train_y"][indices]) for indices in order]

    steps = len(batches())
    first = Trainer(network(), 0.05, given.before * steps)
    for _ in range(given.before):
        for x, y in batches():
            first.step(x, y)
    print(f"trained before: accuracy {first.accuracy(data['test_x'], data['test_y']):.1%}")

    dense = Trainer(copy.deepcopy(first.model), given.lr, given.epochs * steps)
    ours = Trainer(neq.convert(first.model), given.lr, given.epochs * steps)
    neq.attach(ours.optimizer, ours.model)
    controller = neq.NEqController(ours.model, [data["probe"]])
    dense_macs = neq.flops.count(ours.model, data["probe"]).paper
    print("epoch | frozen, by MACs | step of dense, ms | step of neq, ms | ratio")
    for epoch in range(given.epochs):
        frozen = 1 - neq.flops.count(ours.model, data["probe"]).paper / dense_macs
        for i, (x, y) in enumerate(batches()):
            for trainer in (dense, ours) if i % 2 else (ours, dense):
                trainer.step(x, y)
        controller.step()
        one, other = (statistics.median(t.seconds[-steps:]) for t in (dense, ours))
        print(f"{epoch} | {frozen:.1%} | {1e3 * one:.2f} | {1e3 * other:.2f} | {one / other:.3f}")
    for name, trainer in (("dense", dense), ("neq", ours)):
        print(
            f"{name}: accuracy {trainer.accuracy(data['test_x'], data['test_y']):.1%}, "
            f"{sum(trainer.seconds):.2f} s in steps"
        )
    print(f"neq: {sum(entry['seconds'] for entry in controller.history):.2f} s in the controller")


if __name__ == "__main__":
    main()
