"""The neuron class of each layer type: from a table, registered by the user, known of another
library, or derived for a subclass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.fx import Proxy

from neq_kernels.conversion.built_around import built_around
from neq_kernels.conversion.recipe import REGISTERED, Recipe
from neq_kernels.conversion.third_party.families import recipe_for
from neq_kernels.layers import attention, conv, embedding, linear, masked, masked_norm, norm
from neq_kernels.layers.base import NeuronLayer, constructible

NEURON_CLASSES: dict[type[nn.Module], type[NeuronLayer]] = {
    nn.Linear: linear.Linear,
    nn.Bilinear: masked.Bilinear,
    nn.Embedding: embedding.Embedding,
    nn.Conv1d: conv.Conv1d,
    nn.Conv2d: conv.Conv2d,
    nn.Conv3d: conv.Conv3d,
    nn.ConvTranspose1d: conv.ConvTranspose1d,
    nn.ConvTranspose2d: conv.ConvTranspose2d,
    nn.ConvTranspose3d: conv.ConvTranspose3d,
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
    nn.SyncBatchNorm: masked_norm.SyncBatchNorm,
    nn.InstanceNorm1d: masked_norm.InstanceNorm1d,
    nn.InstanceNorm2d: masked_norm.InstanceNorm2d,
    nn.InstanceNorm3d: masked_norm.InstanceNorm3d,
    nn.GroupNorm: norm.GroupNorm,
    nn.LayerNorm: norm.LayerNorm,
    nn.RMSNorm: norm.RMSNorm,
    nn.MultiheadAttention: attention.MultiheadAttention,
}
for _stock, _ours in NEURON_CLASSES.items():
    _ours.stock = _stock


# Weak: a class made in a function is not kept by having been converted once.
_made: WeakValueDictionary[type[nn.Module], type[NeuronLayer]] = WeakValueDictionary()

# What a subclass may define anew without computing anything else.
_HARMLESS = {
    "__init__",
    "__doc__",
    "__module__",
    "__qualname__",
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__dict__",
    "__weakref__",
    "__constants__",
    "__firstlineno__",
    "__static_attributes__",
    "__parameters__",
    "__orig_bases__",
    "__setstate__",
    "__repr__",
    "extra_repr",
    "reset_parameters",
    "_reset_parameters",
    "_version",
    "_load_from_state_dict",
    "_save_to_state_dict",
}
# What decides which parameters a forward reads, and what else computes.
_READS = {"__getattr__", "__getattribute__", "weight", "bias"}
_CALLS = {"forward", "__call__", "_call_impl", "_wrapped_call_impl"}


def neuron_class(kind: type[nn.Module]) -> type[NeuronLayer] | None:
    """The class that :func:`neq_kernels.convert` gives a layer of exactly this class, or None.

    It is made once, is named like the original, derives from it, and pickles as it.
    """
    known = NEURON_CLASSES.get(kind) or _made.get(kind)
    if known is not None:
        return known
    recipe = REGISTERED.get(kind) or _around(kind) or _recipe(kind) or _inherited(kind)
    if recipe is None:
        return None
    made = _make(recipe, kind)
    _made[kind] = made
    return made


def known_base(kind: type[nn.Module]) -> tuple[type[nn.Module], Recipe] | tuple[None, None]:
    """The nearest base of ``kind`` that has a neuron class whoever derives from it, and how."""
    for base in kind.__mro__[1:]:
        recipe = _recipe(base)
        if recipe is not None:
            return base, recipe
    return None, None


def redefined(kind: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """The names of what ``kind`` computes in another way than ``base``."""
    lineage = base.__mro__[: base.__mro__.index(nn.Module)]
    of_base = {name for c in lineage for name in vars(c)} - _HARMLESS | _READS | _CALLS
    between = kind.__mro__[: kind.__mro__.index(base)]
    return sorted({name for c in between for name in vars(c)} & of_base)


def _around(kind: type[nn.Module]) -> Recipe | None:
    base = next((b for b in kind.__mro__[1:] if b in NEURON_CLASSES), None)
    if base is None or redefined(kind, base) != ["forward"]:
        return None
    ours = NEURON_CLASSES[base]
    if ours.is_norm or issubclass(ours, masked.Masked) or not built_around(kind, base):
        return None  # a norm's channels are found better by a masked one
    return Recipe(ours, around=True)


def _recipe(kind: type) -> Recipe | None:
    if kind in NEURON_CLASSES:
        return Recipe(NEURON_CLASSES[kind])
    return recipe_for(kind)


def _inherited(kind: type[nn.Module]) -> Recipe | None:
    base, recipe = known_base(kind)
    if base is None or recipe is None:
        # Large language models bring norms of their own, which differ in nothing that matters here.
        named_norm = kind.__name__.endswith(("RMSNorm", "RmsNorm", "T5LayerNorm"))
        return Recipe(masked_norm.RecognisedNorm) if named_norm else None
    names = set(redefined(kind, base))
    if not names:
        return recipe
    if recipe.ours.is_embedding and not names & _READS:
        # Whatever it computes, a row of its weight belongs to one token or position.
        return Recipe(embedding.EmbeddingWithItsOwnForward)
    if recipe.ours.is_norm and not names & _READS:
        # Whatever it computes, an entry of its parameters belongs to one channel.
        if issubclass(recipe.ours, masked.Masked):
            return recipe
        last = issubclass(base, (nn.LayerNorm, nn.RMSNorm)) and "2d" not in kind.__name__
        return Recipe(masked_norm.MaskedNorm, {"output_dim": -1 if last else 1})
    return None


def _make(recipe: Recipe, kind: type[nn.Module]) -> type[NeuronLayer]:
    def reduce(layer: Any, protocol: Any) -> Any:
        """By the original class: this one cannot be imported."""
        function, arguments, *rest = super(made, layer).__reduce_ex__(max(int(protocol), 2))
        if function.__name__ == "__newobj__" and arguments[0] is made:
            function, arguments = _new, (kind, *arguments[1:])
        return function, arguments, *rest

    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(kind, name) for name in names}
    if recipe.around:
        namespace["forward"] = _leaf(kind)
    made: type[NeuronLayer] = type(
        kind.__name__,
        (kind, recipe.ours) if recipe.around else (recipe.ours, kind),
        {**namespace, **recipe.attributes, "stock": kind, "__reduce_ex__": reduce},
    )
    return constructible(made)


def _leaf(kind: Any) -> Callable[..., Any]:
    """The forward of ``kind``, in a graph of torch.fx the call of the layer: else what is around
    the forward of ours would be in the graph, and in the layer."""

    @wraps(kind.forward)
    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return layer._traced(*args, **kwargs)
        return kind.forward(layer, *args, **kwargs)

    return forward


def _new(kind: type[nn.Module], *arguments: Any) -> NeuronLayer:
    found = neuron_class(kind)
    if found is None:
        raise TypeError(
            f"{kind.__qualname__}: expected a class whose layers have neurons, as when it was "
            "saved, got one without; call neq.register for it before loading"
        )
    return found.__new__(found, *arguments)
