"""The models that the benchmarks train: CIFAR ResNets of our own, torchvision's and timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.models.cifar_resnet import (
    CifarResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from neq_kernels.integrations.named_models import named_model

__all__ = [
    "CifarResNet",
    "build",
    "load_weights",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]

OWN_MODELS = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}


def build(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    pretrained_path: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """A model by name, ready to train.

    Args:
        name: one of ours (``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110``),
            ``torchvision:NAME``, ``timm:NAME``, ``package.module:callable``, or a bare name:
            looked up among ours, then in torchvision, then in timm.
        num_classes: outputs of the classifier.
        in_channels: input channels (torchvision's models take only 3).
        pretrained_path: weights to load, see :func:`load_weights`.
        options: passed on to the constructor of a torchvision or timm model.

    Raises:
        ValueError: unknown name, impossible ``in_channels``, or weights that do not fit.
        TypeError: the constructor refuses one of the options.
        ImportError: the library that the name asks for is not installed.
        FileNotFoundError: no file at ``pretrained_path``.
    """
    if name in OWN_MODELS:
        model: nn.Module = OWN_MODELS[name](num_classes, in_channels, **options)
    else:
        model = named_model(name, num_classes, in_channels, **options)
    if pretrained_path is not None:
        load_weights(model, pretrained_path)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state_dict (``.safetensors``, or what ``torch.save`` wrote) into ``model``, exactly.

    A missing ``num_batches_tracked`` stays as it is (old files have none). Nothing is loaded
    unless everything fits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or a name or shape does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}")
    weights = _read(path)
    own = model.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    misfits = [
        f"{k}: expected {tuple(own[k].shape)}, got {tuple(v.shape)}"
        for k, v in weights.items()
        if k in own and own[k].shape != v.shape
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misfits),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"weights: {path} does not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    model.load_state_dict(weights, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # each reader has error classes of its own
        raise ValueError(f"weights: cannot read {path} ({error})") from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"weights: expected a state_dict in {path}")
    return weights
