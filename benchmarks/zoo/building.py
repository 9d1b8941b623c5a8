"""Build a model of the list and an example for it. No weights are downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import transformers_models as tiny
from benchmarks.zoo.comparison import Example
from benchmarks.zoo.entries import Entry


def build(entry: Entry) -> Example:
    """The model in training mode, with random weights, and its example.

    Raises:
        Exception: whatever the library raises that cannot build it.
    """
    example = _BUILDERS[entry.library](entry)
    example.model.train()
    return example


def _torchvision(entry: Entry) -> Example:
    from torchvision import models

    options = dict(entry.options)
    if entry.input in ("detection", "keypoints", "segmentation"):
        options["weights_backbone"] = None
    model = models.get_model(entry.name, weights=None, **options)
    if entry.input in ("detection", "keypoints"):
        return Example(model, _images_and_targets(entry.input == "keypoints"))
    if entry.input == "segmentation":
        return Example(model, (torch.randn(2, 3, 64, 64),))
    if entry.input == "flow":
        return Example(model, (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128), 2))
    return Example(model, (_tensor(entry),))


def _images_and_targets(keypoints: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    boxes = torch.tensor([[8.0, 8.0, 60.0, 70.0], [20.0, 30.0, 90.0, 80.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    if keypoints:
        corners = torch.stack([boxes[:, :2], boxes[:, 2:]], 1).repeat(1, 9, 1)[:, :17]
        target["keypoints"] = torch.cat([corners, torch.ones(2, 17, 1)], 2)
    else:
        target["masks"] = torch.randint(2, (2, 96, 96), dtype=torch.uint8)
    images = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    return images, [target, {name: value.clone() for name, value in target.items()}]


def _timm(entry: Entry) -> Example:
    import timm

    return Example(timm.create_model(entry.name, **entry.options), (_tensor(entry),))


def _tensor(entry: Entry) -> Tensor:
    return torch.randn(2, *map(int, entry.input.split("x")))


def _transformers(entry: Entry) -> Example:
    import transformers

    kind: Any = getattr(transformers, entry.name)
    config = tiny.tiny(transformers.CONFIG_MAPPING[entry.family](), entry.options)
    model: nn.Module = (
        kind._from_config(config, attn_implementation="eager")
        if (entry.input.endswith("!eager"))
        else kind(config)
    )
    return Example(model, (), tiny.INPUTS[entry.input.removesuffix("!eager")](config))


def _diffusers(entry: Entry) -> Example:
    kind: Any = getattr(importlib.import_module("diffusers"), entry.name)
    return Example(kind(**entry.options), (), _DIFFUSION_INPUTS[entry.input]())


def _noise(*shape: int) -> dict[str, Any]:
    return {"sample": torch.randn(2, *shape), "timestep": torch.tensor([3, 7])}


_DIFFUSION_INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "image": lambda: _noise(3, 32, 32),
    "autoencoder": lambda: {"sample": torch.randn(2, 3, 32, 32)},
    "sequence": lambda: _noise(14, 32),
    "latent": lambda: _noise(4, 16, 16) | {"encoder_hidden_states": torch.randn(2, 6, 32)},
    "video": lambda: _noise(4, 3, 16, 16) | {"encoder_hidden_states": torch.randn(2, 6, 32)},
    "classes": lambda: {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([0, 1]),
    },
    "sd3": lambda: {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 64),
    },
    "flux": lambda: {
        "hidden_states": torch.randn(2, 16, 4),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    },
    "pixart": lambda: {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
}

_BUILDERS: dict[str, Callable[[Entry], Example]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
    "diffusers": _diffusers,
}
