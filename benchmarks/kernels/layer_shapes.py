"""The shape set: every distinct convolution and linear layer of the benchmarked networks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.common.models import build
from neq_kernels.backends.problem import ConvGeometry, Problem
from neq_kernels.measure.problems import problems_of


@dataclass(frozen=True)
class Network:
    """A network, and the batch whose layers are measured."""

    model: str
    images: int
    size: int
    options: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return self.model.rpartition(":")[2]


NETWORKS = (
    Network("resnet32", 128, 32),
    Network("torchvision:resnet18", 16, 128),
    Network("torchvision:resnet50", 8, 128),
    Network("torchvision:mobilenet_v3_small", 32, 128),
    Network("torchvision:convnext_tiny", 8, 128),
    Network("torchvision:vit_b_16", 16, 64, (("image_size", 64),)),
    Network("torchvision:swin_t", 8, 128),
)
LM_HEAD = "lm_head"
NAMES = (*(network.name for network in NETWORKS), LM_HEAD)
# For the fit alone: what a call costs shows in layers that compute next to nothing.
TINY = "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK = ("resnet32", "mobilenet_v3_small")

_RESNET = Network("torchvision:resnet50", 64, 224)
_CONVNEXT = Network("torchvision:convnext_tiny", 64, 224)
_VIT = Network("torchvision:vit_b_16", 64, 224)
# Of each kind of layer some, because a GPU is rented by the minute.
GPU_LAYERS = (
    (_RESNET, ("layer3.1.conv2", "layer3.1.conv3", "layer1.1.conv2")),
    (_VIT, ("encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0.mlp.3")),
    (_CONVNEXT, ("features.5.1.block.0", "features.5.1.block.3", "features.3.1.block.0")),
    (_RESNET, ("layer4.1.conv2", "layer3.1.conv1", "layer2.0.conv2", "layer4.0.downsample.0")),
    (_RESNET, ("conv1",)),
)
GPU_FLOAT32_LAYERS = ((_RESNET, ("layer3.1.conv2",)), (_VIT, (GPU_LAYERS[1][1][0],)))
TRANSFORMER = "transformer"
# Of 8192 tokens, at a width of 4096.
TRANSFORMER_LAYERS = {"mlp up": (8192, 4096, 16384), "mlp down": (8192, 16384, 4096)}


@dataclass(frozen=True)
class Shape:
    """One distinct problem, under the name of the first layer that has it."""

    network: str
    layer: str
    problem: Problem

    @property
    def layout(self) -> str:
        if self.problem.geometry is None:
            return "rows"
        return "nhwc" if self.problem.channels_last else "nchw"


def shape_set(names: Sequence[str] = NAMES, dtype: torch.dtype = torch.float32) -> list[Shape]:
    """The distinct problems of some networks; convolutions in both memory layouts.

    Raises:
        ValueError: a name that is not in the set.
    """
    unknown = sorted(set(names) - {*NAMES, TINY})
    if unknown:
        raise ValueError(f"networks: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")
    distinct: dict[Problem, Shape] = {}
    for network in NETWORKS:
        if network.name not in names:
            continue
        for layer, problem in _layers(network).items():
            layouts = (False,) if problem.geometry is None else (False, True)
            for last in layouts:
                one = problem._replace(channels_last=last)
                distinct.setdefault(one, Shape(network.name, layer, one))
    if TINY in names:
        for layer, one in _tiny_layers():
            distinct.setdefault(one, Shape(TINY, layer, one))
    if LM_HEAD in names:
        problem = Problem((1024, 512), (32_000, 512), None, False, torch.float32)
        distinct.setdefault(problem, Shape(LM_HEAD, LM_HEAD, problem))
    return [replace(s, problem=s.problem._replace(dtype=dtype)) for s in distinct.values()]


def gpu_shapes() -> list[Shape]:
    """Layers for a GPU, the most telling ones first: in bfloat16, a few in float32 too,
    convolutions in both memory layouts."""
    shapes = [
        Shape(TRANSFORMER, layer, Problem((t, c), (k, c), None, False, torch.bfloat16))
        for layer, (t, c, k) in TRANSFORMER_LAYERS.items()
    ]
    for dtype, chosen in ((torch.bfloat16, GPU_LAYERS), (torch.float32, GPU_FLOAT32_LAYERS)):
        for network, layers in chosen:
            for layer in layers:
                problem = _layers(network)[layer]._replace(dtype=dtype)
                for last in (False,) if problem.geometry is None else (True, False):
                    one = problem._replace(channels_last=last)
                    shapes.append(Shape(network.name, layer, one))
    return shapes


def problems_by_cell() -> dict[tuple[str, str, str], Problem]:
    """The whole set, and the layers for the fit, by network, layer and layout."""
    return {(s.network, s.layer, s.layout): s.problem for s in shape_set((*NAMES, TINY))}


def _tiny_layers() -> Iterator[tuple[str, Problem]]:
    for rows, c, k in ((8, 16, 16), (32, 64, 24)):
        yield f"linear {c}", Problem((rows, c), (k, c), None, False, torch.float32)
    for channels, size, last in itertools.product((3, 8, 16), (4, 8), (False, True)):
        for kernel, groups in ((1, 1), (3, 1), (3, channels)):
            geometry = ConvGeometry((1, 1), (kernel // 2,) * 2, (1, 1), False, (0, 0), groups)
            weight_size = (channels, channels // groups, kernel, kernel)
            kind = "depthwise" if groups > 1 else "conv"
            yield (
                f"{kind} {channels}, {kernel}x{kernel}, {size} pixels",
                Problem((2, channels, size, size), weight_size, geometry, last, torch.float32),
            )


@functools.cache
def _layers(network: Network) -> dict[str, Problem]:
    with torch.device("meta"):
        model = build(network.model, 1000 if ":" in network.model else 10, **dict(network.options))
        image = torch.empty(network.images, 3, network.size, network.size)
    return problems_of(model, image)
