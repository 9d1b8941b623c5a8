"""Models by name: torchvision, timm, or any ``package.module:callable``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def named_model(
    name: str, num_classes: int | None = None, in_channels: int | None = None, **options: Any
) -> nn.Module:
    """An untrained model.

    Args:
        name: ``torchvision:resnet18``, ``timm:vit_tiny_patch16_224``, ``package.module:callable``,
            or a bare name, looked up in torchvision first and in timm then.
        num_classes: outputs of the classifier; None leaves the model's own default.
        in_channels: input channels; None leaves the model's own default. torchvision's models
            take 3 and cannot be told otherwise.
        options: passed on to the model's constructor.

    Raises:
        ValueError: no model of that name, or one that does not support ``in_channels``.
        TypeError: the constructor refuses one of the options.
        ImportError: the library or module that the name asks for is not installed.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        return _bare(name, num_classes, in_channels, options)
    if source == "torchvision":
        return _from_torchvision(rest, num_classes, in_channels, options)
    if source == "timm":
        return _from_timm(rest, num_classes, in_channels, options)
    return _from_callable(source, rest, num_classes, in_channels, options)


def _bare(
    name: str, num_classes: int | None, in_channels: int | None, options: dict[str, Any]
) -> nn.Module:
    known: list[str] = []
    missing: list[str] = []
    for library, names, build in (
        ("torchvision", _torchvision_names, _from_torchvision),
        ("timm", _timm_names, _from_timm),
    ):
        try:
            available = names()
        except ImportError:
            missing.append(library)
            continue
        if name in available:
            return build(name, num_classes, in_channels, options)
        known += available
    not_installed = f" ({' and '.join(missing)} not installed)" if missing else ""
    raise ValueError(_unknown(name, known, "torchvision or timm") + not_installed)


def _from_torchvision(
    name: str, num_classes: int | None, in_channels: int | None, options: dict[str, Any]
) -> nn.Module:
    known = _torchvision_names()
    if name not in known:
        raise ValueError(_unknown(name, known, "torchvision"))
    if in_channels not in (None, 3):
        raise ValueError(f"in_channels: torchvision's {name} takes 3, got {in_channels}; try timm")
    from torchvision import models

    options = _given(num_classes=num_classes) | options
    # Detection and segmentation models download a pretrained backbone unless told not to.
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options.setdefault("weights_backbone", None)
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _from_timm(
    name: str, num_classes: int | None, in_channels: int | None, options: dict[str, Any]
) -> nn.Module:
    known = _timm_names()
    if name not in known:
        raise ValueError(_unknown(name, known, "timm"))
    import timm

    options = _given(num_classes=num_classes, in_chans=in_channels) | options
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _from_callable(
    module_name: str,
    attribute: str,
    num_classes: int | None,
    in_channels: int | None,
    options: dict[str, Any],
) -> nn.Module:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"{module_name}: cannot be imported ({error})") from error
    build: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(build):
        raise ValueError(f"{module_name}: has no callable {attribute!r}")
    model = build(**_given(num_classes=num_classes, in_channels=in_channels), **options)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{module_name}:{attribute}: expected a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _torchvision_names() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models()
    return names


def _timm_names() -> list[str]:
    import timm

    names: list[str] = timm.list_models()
    return names


def _given(**arguments: int | None) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}


def _unknown(name: str, known: list[str], where: str) -> str:
    close = difflib.get_close_matches(name, sorted(set(known)), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"model: {where} has none called {name!r}{hint}"
