"""Stop parameters that no neuron owns from learning while their block is frozen."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from neq_kernels.channels import ActiveChannels
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.process_group import in_process_group


class FollowingParameters:
    """Parameters no neuron owns (class tokens, layer scales, position tables) that stop learning
    while every neuron of their block is frozen.

    Two forward hooks of the block put detached aliases in their places for the length of its
    forward; the parameter objects themselves are never touched. Attention inside it has two more.

    Args:
        block: the module whose neurons decide.
        layers: its neuron layers.
        places: (module, name) of each parameter.
        anchor: shared by all layers of the model.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: list[NeuronLayer],
        places: list[tuple[nn.Module, str]],
        anchor: ParameterAnchor,
    ) -> None:
        self._layers, self._places, self.anchor = layers, places, anchor
        self._channels = ActiveChannels(1)
        self._aside: list[Parameter] = []
        self._hooks = [
            block.register_forward_pre_hook(self._before_forward),
            block.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._asking = False
        for attention in {m for m, _ in places if isinstance(m, nn.MultiheadAttention)}:
            self._hooks += [
                attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
                attention.register_forward_hook(self._after_attention, always_call=True),
            ]

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters themselves, during a forward too."""
        if self._aside:
            return list(self._aside)
        return [cast(Parameter, module._parameters[name]) for module, name in self._places]

    @property
    def channels(self) -> ActiveChannels:
        """One channel for all of them: active while any neuron of the block is."""
        self._channels.set([not self._stops()])
        return self._channels

    def remove(self) -> None:
        """Remove the hooks: the parameters are always trained again."""
        for hook in self._hooks:
            hook.remove()

    def _stops(self) -> bool:
        return all(layer.channels.none_active for layer in self._layers)

    def _before_forward(self, block: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled() or self._aside:
            return
        if torch.compiler.is_compiling():
            if not self._layers[0].specialized or in_process_group() or not self._stops():
                return
        elif not self._stops():
            return
        elif in_process_group():
            self.anchor.add(self.parameters)
        self._aside = self.parameters
        for module, name in self._places:
            parameter = cast(Parameter, module._parameters[name])
            module._parameters[name] = parameter.detach()  # type: ignore[assignment]

    def _after_forward(self, block: nn.Module, args: object, output: object) -> None:
        if self._aside:
            for (module, name), parameter in zip(self._places, self._aside, strict=True):
                module._parameters[name] = parameter
            self._aside = []

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run attention that no gradient reaches in no_grad, on aliases that require a gradient:
        if nothing requires one, PyTorch projects a batch-first input by many small products."""
        if not self._aside or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if not any(t.requires_grad for t in tensors):
            torch.set_grad_enabled(False)
            self._aliases_ask(True)

    def _after_attention(self, attention: nn.Module, args: object, output: object) -> None:
        if self._asking:
            self._aliases_ask(False)
            torch.set_grad_enabled(True)

    def _aliases_ask(self, asking: bool) -> None:
        self._asking = asking
        for module, name in self._places:
            cast(Tensor, module._parameters[name]).requires_grad_(asking)
