"""Networks whose step takes a millisecond."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.common.workloads import Workload


def build(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


TINY = {"tiny": Workload("tiny", build, 4, (3, 8, 8))}


class BasicBlock(nn.Sequential):
    """Named as torchvision names its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def build_blocks(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *(BasicBlock(8) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


BLOCKS = {"blocks": Workload("blocks", build_blocks, 4, (3, 8, 8))}
