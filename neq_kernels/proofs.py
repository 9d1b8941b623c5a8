"""Which backends were proved right on the GPU at hand.

Kernels that are right on one GPU, or on none but the tests' emulator, may be compiled wrongly for
another. So those for GPUs serve by themselves only where the self-check found every gradient, sum
and step of theirs right; :func:`neq_kernels.selfcheck.prove` runs it. Its outcome is kept beside
the tuning tables, for each GPU and version of PyTorch, of Triton and of this package.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neq_kernels.tuning import directory, file_name, write_whole
from neq_kernels.version import __version__

logger = logging.getLogger(__name__)


def proved() -> tuple[str, ...] | None:
    """The backends that passed on this GPU; None where that was never asked."""
    if not torch.cuda.is_available():
        return None
    about = _about()
    path = _path(about)
    try:
        saved = json.loads(path.read_text())
        if saved["checked_with"] != about:
            raise ValueError("it was checked with something else")
        return tuple(map(str, saved["right"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None


def keep(right: Iterable[str]) -> None:
    """Remember which backends passed on this GPU."""
    about = _about()
    write_whole(_path(about), json.dumps({"checked_with": about, "right": sorted(right)}, indent=1))


def _path(about: dict[str, Any]) -> Path:
    return directory() / file_name("selfcheck", about)


@functools.cache
def _about() -> dict[str, Any]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "accelerator": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "neq_kernels": __version__,
    }
