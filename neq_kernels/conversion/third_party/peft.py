"""peft: layers inside an adapter, which computes with their weights itself (merging, DoRA)."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def adapted(model: nn.Module) -> set[nn.Module]:
    """The base layers of adapters in ``model``, and what is inside of them."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return set()
    adapters = (m for m in model.modules() if isinstance(m, tuners.BaseTunerLayer))
    bases = (a._modules.get("base_layer") for a in adapters)
    return {inner for base in bases if base is not None for inner in base.modules()}
