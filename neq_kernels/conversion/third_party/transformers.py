"""transformers: Conv1D, norms of their own, stacked experts, and layers with a forward of their
own."""

from __future__ import annotations

from torch import nn

from neq_kernels.conversion.recipe import Recipe
from neq_kernels.layers import linear
from neq_kernels.layers.masked import Masked, Owned
from neq_kernels.layers.masked_norm import RecognisedNorm

_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)
# Experts whose matrices are [expert, in, out]; the others' are [expert, out, in].
_TRANSPOSED = {"AriaExperts", "GptOssExperts", "Llama4TextExperts", "OpenAIPrivacyFilterExperts"}
# Experts that hold other matrices than gate_up_proj and down_proj.
_MATRICES = {
    "NemotronHExperts": ("up_proj", "down_proj"),
    "InklingSharedExperts": ("gate_proj", "up_proj", "down_proj"),
}


class Experts(Masked):
    """A mixture's experts as stacks of matrices: a neuron is one output feature of one of them.
    No output shows them one by one."""

    output_dim = None

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        reason = super().reason_against(layer)
        up, down = (layer._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
        if reason is None and up is not None and down is not None and up.dim() == down.dim() == 3:
            into, out = (1, 2) if cls.owned[0].axis == 2 else (2, 1)
            if up.shape[into] != down.shape[out]:
                return f"its experts are stored otherwise: {tuple(up.shape)}, {tuple(down.shape)}"
        return reason


def recipe(kind: type[nn.Module]) -> Recipe | None:
    name = kind.__name__
    if name == "Conv1D":
        return Recipe(linear.TransposedLinear)
    if name == "GroupedLinearLayer":
        return Recipe(Masked, {"owned": (Owned("weight", axis=2, groups=None), Owned("bias"))})
    if name == "XLNetRelativeAttention":
        return _xlnet()
    if name.endswith("ParallelExperts"):
        return Recipe(Experts, {"owned": (Owned("weight", axis=1, groups=None),)})
    if name.endswith("Experts") and not issubclass(kind, (nn.ModuleDict, nn.ModuleList)):
        return _experts(name)
    if name.lower().endswith("topkrouter") or (
        issubclass(kind, _PRODUCTS) and "forward" in vars(kind)
    ):
        return Recipe(Masked, {"output_dim": 1 if issubclass(kind, _PRODUCTS[1]) else -1})
    if "RMSNorm" in name or name.endswith(("LayerNorm", "NoNorm")):
        return None if issubclass(kind, nn.LayerNorm) else Recipe(RecognisedNorm)
    return None


def _xlnet() -> Recipe:
    """Its projections are ``[in, head, feature]``: a neuron is a head, in all that it projects
    with; the way back, ``[out, head, feature]``, has neurons of its own."""
    heads = (*(Owned(name, axis=1) for name in "qkvr"), Owned("seg_embed", axis=1))
    biases = tuple(Owned(f"r_{name}_bias") for name in "rsw")
    further = ((Owned("o"),),)
    return Recipe(Masked, {"owned": (*heads, *biases), "further": further, "output_dim": None})


def _experts(name: str) -> Recipe:
    axis = 2 if name in _TRANSPOSED else 1
    first, *further = (
        (Owned(matrix, axis, None), Owned(f"{matrix}_bias", 1, None))
        for matrix in _MATRICES.get(name, ("gate_up_proj", "down_proj"))
    )
    return Recipe(Experts, {"owned": first, "further": tuple(further)})
