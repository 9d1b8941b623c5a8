"""Masks the user has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from neq_kernels.channels import ActiveChannels
from neq_kernels.controllers.base import Controller, Masks


class FixedController(Controller[None]):
    """Sets the given masks at once and holds them.

    Embeddings are layers as all others here.

    Args:
        model: a model with converted layers.
        masks: for some layer names the active channels, in any form
            :meth:`ActiveChannels.set <neq_kernels.channels.ActiveChannels.set>` takes: a bool mask
            of length K or integer indices. Layers not named are left as they are.

    Raises:
        TypeError: a mask of another dtype, or ``masks`` no mapping.
        ValueError: a name that is no converted layer, a mask of another length, an index out of
            range or twice, or no active neuron left in any layer that learns. Nothing has been set.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor | Sequence[bool] | Sequence[int]],
    ) -> None:
        super().__init__(model, embeddings=True)
        if not isinstance(masks, Mapping):
            raise TypeError(
                f"masks: expected a mapping from layer names, got {type(masks).__name__}"
            )
        if unknown := sorted(map(str, masks.keys() - self._layers.keys())):
            raise ValueError(f"masks: expected names among {list(self._layers)}, got {unknown}")
        self._masks: Masks = {name: self._checked(name, mask) for name, mask in masks.items()}
        left = [
            bool(self._masks[name].any()) if name in self._masks else layer.channels.n_active
            for name, layer in self._decided().items()
        ]
        if left and not any(left):
            raise ValueError(
                "masks: expected at least one active neuron in the layers that learn, got none: "
                "the loss would have no graph"
            )
        self._set_masks(self._masks, None)

    def _checked(self, name: str, mask: Tensor | Sequence[bool] | Sequence[int]) -> Tensor:
        trial = ActiveChannels(len(self._layers[name].channels))
        try:
            trial.set(mask)
        except (TypeError, ValueError) as error:
            raise type(error)(f"masks[{name!r}]: {error}") from error
        return trial.mask

    def _decide(self) -> tuple[Masks, None]:
        return self._masks, None

    def _accept(self, pending: None) -> None:
        pass
