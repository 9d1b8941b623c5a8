"""Which backends for GPUs were found right on the GPU at hand.

Kernels that are right on one GPU, or on none but the tests' emulator, may be compiled wrongly for
another. So those for GPUs are a default only where the self-check found them right
(:func:`neq_kernels.doctor.runner.prove` runs it). Its outcome is kept beside the tuning tables, for
each GPU, build of the kernels, and version of PyTorch, of Triton and of this package. Where GPUs of
several kinds are visible nothing is kept: a check runs on one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from neq_kernels.backends.base import Backend
from neq_kernels.dispatch.tuning_table import directory, file_name, write_whole
from neq_kernels.version import __version__

logger = logging.getLogger(__name__)


class VerifiedBackends:
    """What the self-check found, by GPU and build.

    Args:
        backends: all of them, by name.
    """

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        # What this process found out, should it not be able to write it down.
        self._outcomes: dict[str, tuple[str, ...]] = {}

    def names(self) -> tuple[str, ...] | None:
        """The backends that passed on this GPU; None where that was never asked, or cannot be."""
        about = self._about()
        if about is None:
            return None
        name = file_name("selfcheck", about)
        if name in self._outcomes:
            return self._outcomes[name]
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

    def keep(self, right: Iterable[str]) -> None:
        """Remember which backends passed on this GPU: here, and where a file can be written (a
        warning says where not) in later processes."""
        about = self._about()
        if about is None:
            return
        name = file_name("selfcheck", about)
        self._outcomes[name] = tuple(right)
        text = json.dumps({"checked_with": about, "right": sorted(right)}, indent=1)
        write_whole(directory() / name, text)

    def _about(self) -> dict[str, Any] | None:
        """What an outcome holds for; None where there is no GPU, or several kinds of them."""
        if not torch.cuda.is_available():
            return None
        kinds = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        if len(kinds) != 1:
            return None
        builds = {
            name: backend.build() for name, backend in self._backends.items() if backend.for_gpus
        }
        about = {"accelerator": kinds.pop(), "torch": torch.__version__}
        return about | builds | {"neq_kernels": __version__}
