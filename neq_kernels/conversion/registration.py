"""Layer types of the user's own."""

from __future__ import annotations

from torch import nn

from neq_kernels.conversion.neuron_classes import neuron_class
from neq_kernels.conversion.recipe import REGISTERED, Recipe
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.masked import Masked, Owned


def register(
    cls: type[nn.Module],
    *,
    weight: str = "weight",
    bias: str | None = "bias",
    axis: int = 0,
    groups: int = 1,
    channel_dim: int = -1,
) -> type[nn.Module]:
    """Let :func:`neq_kernels.convert` give neurons to layers of a class of your own.

    Such a layer runs its own forward, on parameters whose frozen neurons are constants: gradients
    of every order are right, at the cost of the dense ones; wholly frozen, the layer costs no
    weight gradient and saves nothing for one. Holds for the process, and for this very class: not
    for its subclasses. Can be used as a decorator.

    Args:
        cls: a subclass of ``torch.nn.Module`` that holds the parameters itself.
        weight: the name of the parameter that holds the neurons.
        bias: the name of a second one, ``[K]``; a layer may lack it, or hold None.
        axis: the dimension of ``weight`` that enumerates the neurons, of each part if there are
            ``groups``.
        groups: the number of equal parts that dimension 0 of ``weight`` is cut into.
        channel_dim: the dimension of the layer's output that enumerates the neurons.

    Returns:
        ``cls``.

    Raises:
        TypeError: ``cls`` is no module class, or an argument has another type.
        ValueError: ``cls`` is a class of PyTorch or one that convert knows, or is registered in
            another way already; or a number is out of range.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    for name, value, kind in (
        ("weight", weight, str),
        ("bias", bias, (str, type(None))),
        ("axis", axis, int),
        ("groups", groups, int),
        ("channel_dim", channel_dim, int),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}: expected {kind}, got {value!r}")
    if axis < 0 or groups < 1 or (groups > 1 and axis == 0):
        raise ValueError(
            "axis, groups: expected axis >= 0 and groups >= 1, with axis >= 1 where there are "
            f"groups, got axis={axis}, groups={groups}"
        )
    owned = [Owned(weight, axis, groups)] + ([] if bias is None else [Owned(bias)])
    recipe = Recipe(Masked, {"owned": tuple(owned), "output_dim": channel_dim})
    known = REGISTERED.get(cls)
    if known is not None and known != recipe:
        raise ValueError(
            f"cls: expected {cls.__qualname__} to be registered once, or with the same arguments, "
            f"got {dict(recipe.attributes)} after {dict(known.attributes)}"
        )
    if cls.__module__.partition(".")[0] == "torch" or issubclass(cls, NeuronLayer):
        raise ValueError(
            f"cls: expected a class of your own, got {cls.__module__}.{cls.__qualname__}; derive a "
            "class from it and register that"
        )
    if known is None and neuron_class(cls) is not None:
        raise ValueError(
            f"cls: expected a class that convert does not know, got {cls.__qualname__}; convert "
            "gives its layers neurons already"
        )
    REGISTERED[cls] = recipe
    return cls
