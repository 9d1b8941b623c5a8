"""Arguments of the ``neq`` command, and the model that they name."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import torch

from neq_kernels.integrations.named_models import named_model

DEFAULT_SIZE = (224, 224)


class UserError(Exception):
    """Told to the user in one line, without a traceback."""


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Which model, and what it is made and run with."""
    command.add_argument(
        "model",
        help="torchvision:NAME, timm:NAME, package.module:callable, or a bare name, looked up in "
        "torchvision and then in timm",
    )
    command.add_argument(
        "--size", type=size, default=DEFAULT_SIZE, metavar="HxW", help="image size (224x224)"
    )
    command.add_argument("--classes", type=positive, metavar="N", help="the model's own by default")
    command.add_argument("--in-channels", type=positive, metavar="C", help="3 by default")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        type=option,
        metavar="NAME=VALUE",
        help="passed on to the model's constructor; may be repeated",
    )


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def size(text: str) -> tuple[int, int]:
    """``HxW``, or one number for both."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected HxW or one number, got {text!r}")
    return int(parts[0]), int(parts[-1])


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; the value is a Python literal or else text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def model_of(args: argparse.Namespace) -> torch.nn.Module:
    """The model; raises UserError."""
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command does not have it, a script of the user's does
        sys.path.insert(0, here)
    try:
        return named_model(args.model, args.classes, args.in_channels, **dict(args.option))
    except Exception as error:  # whatever a stranger's constructor raises
        raise UserError(str(error) or type(error).__name__) from error


def image_of(args: argparse.Namespace, batch: int = 1) -> torch.Tensor:
    """Images of the size asked for, all zero: ``[batch, channels, height, width]``."""
    return torch.zeros(batch, args.in_channels or 3, *args.size)
