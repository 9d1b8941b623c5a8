"""Which backends were proved right on the GPU at hand.

Kernels that are right on one GPU, or on none but the tests' emulator, may be compiled wrongly for
another. So those for GPUs serve by themselves only where the self-check found them right;
:func:`neq_kernels.doctor.runner.prove` runs it. Its outcome is kept beside the tuning tables, for
each GPU, build of the kernels, and version of PyTorch, of Triton and of this package. Where GPUs of
several kinds are visible nothing is proved: a check runs on one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

import torch

from neq_kernels.backends import cuda
from neq_kernels.backends.triton import backend as triton
from neq_kernels.dispatch.tuning_table import directory, file_name, write_whole
from neq_kernels.version import __version__

logger = logging.getLogger(__name__)

# What this process found out, should it not be able to write it down.
_outcomes: dict[str, tuple[str, ...]] = {}


def proved() -> tuple[str, ...] | None:
    """The backends that passed on this GPU; None where that was never asked, or cannot be."""
    about = _about()
    if about is None:
        return None
    name = file_name("selfcheck", about)
    if name in _outcomes:
        return _outcomes[name]
    path = directory() / name
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
    """Remember which backends passed on this GPU: here, and where a file can be written (a warning
    says where not) in later processes."""
    about = _about()
    if about is None:
        return
    name = file_name("selfcheck", about)
    _outcomes[name] = tuple(right)
    text = json.dumps({"checked_with": about, "right": sorted(right)}, indent=1)
    write_whole(directory() / name, text)


def _about() -> dict[str, Any] | None:
    """What a proof holds for; None where there is no GPU, or several kinds of them."""
    if not torch.cuda.is_available():
        return None
    kinds = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if len(kinds) != 1:
        return None
    return {"accelerator": kinds.pop(), "torch": torch.__version__, **_built_with()}


@functools.cache
def _built_with() -> dict[str, str]:
    library = cuda.LIBRARY
    return {
        "cuda library": hashlib.sha256(library.read_bytes()).hexdigest()
        if library.exists()
        else "",
        "triton": triton.version() if triton.unavailable() is None else "",
        "neq_kernels": __version__,
    }
