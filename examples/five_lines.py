"""NEq in a plain PyTorch training script: the lines marked with `# neq` are all that is added.

    python examples/five_lines.py

Trains a small network on the bundled Fashion-MNIST subset and prints, for every epoch, the loss,
the seconds it took (the controller's included) and the share of neurons that the next epoch skips.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neq_kernels as neq  # neq

DATA = Path(__file__).parents[1] / "benchmarks" / "training" / "data" / "fashion_mnist_12k.npz"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def load(limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images and labels, and 50 images of the test set as probe."""
    with np.load(DATA) as arrays:
        images, labels, probe = arrays["train_x"], arrays["train_y"], arrays["test_x"][:50]

    def normalised(x: np.ndarray) -> Tensor:
        return (torch.from_numpy(x).float().unsqueeze(1) / 255 - 0.286) / 0.353

    return normalised(images[:limit]), torch.from_numpy(labels[:limit]).long(), normalised(probe)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--images", type=positive, default=1000, help="training images (1000)")
    parser.add_argument("--batch", type=positive, default=50)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y, probe = load(given.images)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )
    model = neq.convert(model)  # neq
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    neq.attach(optimizer, model)  # neq
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.epochs)
    controller = neq.NEqController(model, [probe])  # neq

    for epoch in range(given.epochs):
        start = time.perf_counter()
        losses = []
        for indices in torch.randperm(len(x)).split(given.batch):
            loss = F.cross_entropy(model(x[indices]), y[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        controller.step()  # neq
        seconds = time.perf_counter() - start
        layers = controller.history[-1]["layers"].values()
        active = sum(layer["active"] for layer in layers)
        total = sum(layer["total"] for layer in layers)
        print(
            f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, {seconds:.2f} s, "
            f"{1 - active / total:.0%} of {total} neurons frozen in the next epoch"
        )


if __name__ == "__main__":
    main()
