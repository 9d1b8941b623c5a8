"""The settings of one training run, and the command-line arguments made from them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.common import cli
from benchmarks.training.data.datasets import AUGMENTATIONS

POLICIES = ("dense", "neq", "stochastic", "fixed")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "step", "constant")


def _setting(default: Any, help: str, **argument: Any) -> Any:
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes. Written to ``config.json``."""

    model: str = _setting(
        "resnet20",
        "resnet20 and other CIFAR ResNets, torchvision:NAME, timm:NAME, or MODULE:CALLABLE",
    )
    data: str = _setting("fashion-mnist", "fashion-mnist, cifar10, a folder, or FILE.npz")
    policy: str = _setting("neq", "which neurons are updated", choices=POLICIES)

    epochs: int = _setting(10, "number of epochs")
    batch: int = _setting(100, "images per step")
    optimizer: str = _setting("sgd", "optimizer", choices=OPTIMIZERS)
    lr: float = _setting(0.1, "initial learning rate")
    momentum: float = _setting(0.9, "SGD's momentum, Adam's first beta")
    weight_decay: float = _setting(5e-4, "weight decay")
    schedule: str = _setting("cosine", "learning-rate schedule", choices=SCHEDULES)
    milestones: tuple[int, ...] = _setting(
        (), "epochs at which --schedule step divides the learning rate by 10", type=int, nargs="+"
    )
    seed: int = _setting(0, "seed of the weights, the data order and the augmentation")
    init: str | None = _setting(
        None, "start from these weights (.safetensors, or a state_dict that torch.save wrote)"
    )
    augment: str = _setting("crop-flip", "augmentation of training images", choices=AUGMENTATIONS)
    amp: str = _setting("none", "autocast", choices=("none", "bf16"))

    eps: float = _setting(1e-3, "NEq: a neuron freezes when its velocity is within eps of 0")
    mu: float = _setting(0.5, "NEq: momentum of the velocity")
    velocity: str = _setting("slide", "NEq: velocity formula", choices=("slide", "reference"))
    similarity: str = _setting("neuron", "NEq: similarity", choices=("neuron", "sample"))
    probe: int = _setting(50, "images held out of training, in every policy, as the NEq probe")
    warmup: int = _setting(1, "first epochs in which everything is active")
    p: float = _setting(0.5, "stochastic: share of the neurons frozen in each epoch")
    masks: str | None = _setting(
        None, "fixed: JSON file {layer name: [indices of the active neurons]}"
    )
    others: str = _setting("train", "parameters no neuron owns", choices=("train", "follow"))
    frozen_state: str = _setting(
        "reset", "optimizer state of frozen neurons", choices=("reset", "keep", "reference")
    )

    data_root: str = _setting("data", "where cifar10 is or is downloaded to")
    limit_train: int | None = _setting(None, "use only so many training images", type=cli.positive)
    limit_test: int | None = _setting(None, "use only so many test images", type=cli.positive)
    image_size: int | None = _setting(
        None, "resize images to this height and width", type=cli.positive
    )
    device: str = _setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    threads: int | None = _setting(
        None, "CPU threads (default: PyTorch's own choice)", type=cli.positive
    )
    channels_last: bool = _setting(False, "channels_last memory format")
    profile: bool = _setting(True, "measure the dense step's shares (for the bound) at the start")

    def __post_init__(self) -> None:
        for item in fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices is not None and value not in choices:
                raise ValueError(
                    f"{item.name}: expected one of {', '.join(choices)}, got {value!r}"
                )
        for name, least in (("epochs", 1), ("batch", 1), ("probe", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p: expected a share between 0 and 1, got {self.p}")
        if (self.policy == "fixed") != (self.masks is not None):
            raise ValueError(
                f"masks: expected a file with policy fixed and only there, got policy "
                f"{self.policy} and masks {self.masks}"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """Raises ValueError on names this version does not know."""
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"settings: unknown names {sorted(unknown)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per setting; what the user does not type is absent from the parsed result."""
    for item in fields(Settings):
        name, argument = "--" + item.name.replace("_", "-"), dict(item.metadata)
        shown = "" if item.default in (None, ()) else f" (default: {item.default})"
        argument["help"] = argument["help"].replace("%", "%%") + shown
        if isinstance(item.default, bool):
            argument["action"] = argparse.BooleanOptionalAction
        elif "type" not in argument and "choices" not in argument and item.default is not None:
            argument["type"] = type(item.default)
        parser.add_argument(name, default=argparse.SUPPRESS, **argument)


def read_masks(path: str) -> dict[str, list[int]]:
    """The active neurons per layer from a JSON file.

    Raises:
        ValueError: the file cannot be read or has another structure.
    """
    try:
        masks = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"masks {path}: expected a JSON file ({error})") from error
    if not isinstance(masks, dict) or not all(isinstance(v, list) for v in masks.values()):
        raise ValueError(f"masks {path}: expected {{layer name: [indices]}}")
    return masks
