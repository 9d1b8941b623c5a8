"""The networks and batches whose training steps are benchmarked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import models
from neq_kernels.layers.traversal import named_neuron_layers

Layout = Literal["nchw", "nhwc", "any"]
Batch = tuple[Tensor, Tensor]
FORMATS = {"nhwc": torch.channels_last}
IMAGE_LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
N_BATCHES = 4
SEED = 2022


def mlp(num_classes: int = 10, in_channels: int = 1024, width: int = 1024) -> nn.Module:
    """Four hidden layers."""
    hidden = [
        layer
        for features in (in_channels, width, width, width)
        for layer in (nn.Linear(features, width), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(width, num_classes))


@dataclass(frozen=True)
class Workload:
    """One network and its batch.

    Attributes:
        build: ``build(classes, **options)`` makes the model.
        images: per batch.
        shape: of one input.
        layouts: the memory formats that make a difference.
        device: of the model and its batches.
        autocast: the dtype that the forward is cast to, None without autocast.
    """

    name: str
    build: Callable[..., nn.Module]
    images: int
    shape: tuple[int, ...]
    classes: int = 10
    layouts: tuple[Layout, ...] = IMAGE_LAYOUTS
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    autocast: torch.dtype | None = None

    def model(self, layout: Layout) -> nn.Module:
        """The same weights at every call; in training mode, but nothing is random in it."""
        on_gpu = self.device == "cuda"
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
            torch.manual_seed(SEED)
            # Without a context for the CPU, a model may be built on ``meta``.
            with torch.device(self.device) if on_gpu else nullcontext():
                model = self.build(self.classes, **self.options)
        model.to(memory_format=FORMATS.get(layout, torch.preserve_format)).train()
        for module in model.modules():
            if type(module).__name__.endswith(("Dropout", "StochasticDepth")):
                module.eval()
        return model

    def batches(self, layout: Layout, n: int = N_BATCHES) -> list[Batch]:
        """Random inputs and labels, the same at every call."""
        generator = torch.Generator().manual_seed(SEED)
        memory_format = FORMATS.get(layout, torch.contiguous_format)
        return [
            (
                torch.randn(self.images, *self.shape, generator=generator)
                .to(self.device)
                .contiguous(memory_format=memory_format),
                torch.randint(self.classes, (self.images,), generator=generator).to(self.device),
            )
            for _ in range(n)
        ]

    @property
    def dtype(self) -> str:
        """What the forward is computed in."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of a forward, under autocast if the workload asks for it."""
        if self.autocast is None:
            return loss(model, batch)
        with torch.autocast(self.device, self.autocast):
            return loss(model, batch)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def computes_bfloat16() -> bool:
    """Whether this machine's CPU multiplies in bfloat16, as far as this version of PyTorch says."""
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def output_layer(model: nn.Module) -> str:
    """The last layer of a converted model whose output layer comes last, as all of these do."""
    return [name for name, layer in named_neuron_layers(model) if not layer.is_norm][-1]


def random_masks(model: nn.Module, r: float, seed: int = SEED) -> dict[str, Tensor]:
    """Active channels of every layer of a converted model: ``max(1, round(r K))`` at random; with
    ``r = 0`` none, but all of the output layer's."""
    generator = torch.Generator().manual_seed(seed)
    head = output_layer(model)
    masks = {}
    for name, layer in named_neuron_layers(model):
        k = len(layer.channels)
        n = max(1, round(r * k)) if r > 0 else k * (name == head)
        masks[name] = torch.randperm(k, generator=generator)[:n].sort().values
    return masks


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the masks of a converted model."""
    for name, layer in named_neuron_layers(model):
        layer.channels.set(masks[name])


def _named(model: str) -> Callable[..., nn.Module]:
    return partial(models.build, model)  # unlike a lambda it can be sent to another process


# ViT's one convolution is its patch embedding, so memory format makes no difference worth a row.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("resnet32", _named("resnet32"), 128, (3, 32, 32)),
        Workload("resnet18", _named("torchvision:resnet18"), 16, (3, 128, 128), 1000),
        Workload("resnet50", _named("torchvision:resnet50"), 8, (3, 128, 128), 1000),
        Workload(
            "mobilenet_v3_small",
            _named("torchvision:mobilenet_v3_small"),
            32,
            (3, 128, 128),
            1000,
        ),
        Workload("convnext_tiny", _named("torchvision:convnext_tiny"), 8, (3, 128, 128), 1000),
        Workload(
            "vit_b_16",
            _named("torchvision:vit_b_16"),
            16,
            (3, 64, 64),
            1000,
            layouts=("nchw",),
            options={"image_size": 64},
        ),
        Workload("mlp", mlp, 512, (1024,), layouts=("any",)),
    )
}
# The same under autocast, where the CPU has instructions for it (:func:`computes_bfloat16`).
BF16_WORKLOADS = {
    name: replace(WORKLOADS[name], autocast=torch.bfloat16, layouts=layouts)
    for name, layouts in (
        ("resnet50", IMAGE_LAYOUTS),
        ("mlp", WORKLOADS["mlp"].layouts),
        ("convnext_tiny", ("nhwc",)),
    )
}
_ON_GPU: Mapping[str, Any] = {"device": "cuda", "autocast": torch.bfloat16}
GPU_WORKLOADS = (
    Workload(
        "resnet50",
        _named("torchvision:resnet50"),
        128,
        (3, 224, 224),
        1000,
        layouts=("nhwc",),
        **_ON_GPU,
    ),
    Workload(
        "mlp_4x4096",
        mlp,
        8192,
        (4096,),
        layouts=("any",),
        options={"in_channels": 4096, "width": 4096},
        **_ON_GPU,
    ),
    Workload(
        "vit_b_16",
        _named("torchvision:vit_b_16"),
        64,
        (3, 224, 224),
        1000,
        layouts=("nchw",),
        **_ON_GPU,
    ),
)
