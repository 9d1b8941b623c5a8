"""Networks whose step is counted by hand, and predictors whose answers can be worked out."""

from __future__ import annotations

from torch import nn

from benchmarks.cases import Case
from benchmarks.matmul_predictor import Kernel
from benchmarks.predicted_step import ASSUMPTIONS, GPUS, PredictedStep, needed_gemms
from benchmarks.step_work import meta_model, step_work

LAUNCH = 1e-5


class Attending(nn.Module):
    """Attention that no layer of ours replaces, between two that are."""

    def __init__(self, classes):
        super().__init__()
        self.before = nn.Linear(32, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        x = self.before(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def linear_stack(classes):
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 128), nn.Linear(128, classes))


def convs(classes):
    return nn.Sequential(
        nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 7, padding=3, groups=64),
        nn.Conv2d(64, 96, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, classes),
    )


STACK = Case("stack", linear_stack, 40, (96,), layouts=("any",))
CONVS = Case("convs", convs, 4, (16, 12, 12))
ATTENDING = Case("attending", Attending, 3, (5, 32), layouts=("any",))


def by_work(gpu, dtype, gemms):
    """A predictor of a machine that only computes, at 1 TFLOP/s."""
    return {g: (Kernel(2 * g.m * g.n * g.k / 1e12, 0.0, 0.0, LAUNCH),) for g in gemms}


def free(gpu, dtype, gemms):
    return {g: (Kernel(0.0, 0.0, 0.0, LAUNCH),) for g in gemms}


def work_of(case, layout=None):
    model, x = meta_model(case, layout or case.layouts[0], "bf16")
    return step_work(model, x)


def step_of(
    work, ask=by_work, assumptions=ASSUMPTIONS["optimistic"], gpu=GPUS["H100"], active=None
):
    active = active or {layer.name: set() for layer in work.layers}
    return PredictedStep(gpu, work, ask("", "bf16", needed_gemms(work, active)), assumptions)
