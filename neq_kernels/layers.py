"""Drop-in subclasses of torch.nn layers that own an :class:`ActiveChannels`.

They are not constructed: :func:`neq_kernels.convert` changes the class of an existing layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from neq_kernels import functional
from neq_kernels.autograd import all_active
from neq_kernels.channels import WHOLE_PARAMETER, ActiveChannels, NeuronLayout
from neq_kernels.distributed import StoppedParameters, in_process_group
from neq_kernels.plans import watched

Owners = dict[Parameter, list[tuple[ActiveChannels, NeuronLayout]]]


class NeuronLayer(nn.Module):
    """A layer whose output channels (neurons) can be frozen one by one.

    Attributes:
        channels: the active output channels. Layers that share a weight share this object.
        grad_input: ``"exact"`` or ``"active"`` (approximate), see :func:`neq_kernels.convert`.
        specialized: whether ``torch.compile`` may recompile when the layer stops or starts again.
        stopped: where parameters of wholly frozen layers wait for a data-parallel reducer.
    """

    is_norm: ClassVar[bool] = False
    channels: ActiveChannels
    grad_input: functional.GradInput
    specialized: bool
    stopped: StoppedParameters

    # torch.nn declares these differently from class to class.
    weight: Any
    bias: Any

    @property
    def layout(self) -> NeuronLayout:
        """Where a neuron lies in ``weight``."""
        return NeuronLayout()

    def channel_dim(self, output: Tensor) -> int:
        """The dimension of ``output`` that enumerates the neurons."""
        raise NotImplementedError

    def neuron_parameters(self) -> list[tuple[Parameter, NeuronLayout]]:
        """The parameters the neurons own, with the place of a neuron in each."""
        owned = []
        if isinstance(self.weight, Parameter):
            owned.append((self.weight, self.layout))
        if isinstance(self.bias, Parameter):
            owned.append((self.bias, NeuronLayout()))
        return owned

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.channels.n_active}/{len(self.channels)}"

    def _stops(self) -> bool:
        """Under compile: whether this graph is one in which the layer is wholly frozen."""
        return self.specialized and self.channels.stopped and not in_process_group()

    def _learned(self) -> tuple[Any, Tensor | None]:
        """Weight and bias, as the graph being compiled is to see them."""
        own = self._parameters
        if "weight" in own and "bias" in own:  # where Module.__getattr__, too, would find them
            weight, bias = own["weight"], own["bias"]
        else:
            weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling() and self._stops():
            return functional.detached(weight), functional.detached(bias)
        return weight, bias

    def _anchored(self, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return output
        stopped = self.channels.stopped
        if not stopped and not self.stopped.waiting:
            return output
        if stopped and torch.is_grad_enabled() and in_process_group():
            self.stopped.add(p for p, _ in self.neuron_parameters())
        return self.stopped.anchor(output) if self.stopped.waiting else output

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter, _ in self.neuron_parameters():
            self.channels.prepare(parameter.device)
        return self


class Linear(NeuronLayer, nn.Linear):
    """``torch.nn.Linear`` with neurons that can be frozen: one per output feature."""

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._learned()
        out = functional.linear(input, weight, bias, self.channels, grad_input=self.grad_input)
        return self._anchored(out)


class _AnyConv(NeuronLayer):
    # torch.nn declares these differently from class to class.
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - len(self.kernel_size) - 1

    def _convolve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, **options: Any
    ) -> Tensor:
        out = functional.conv(
            input,
            weight,
            bias,
            self.channels,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            grad_input=self.grad_input,
            **options,
        )
        return self._anchored(out)


class _Conv(_AnyConv):
    padding_mode: Any
    _reversed_padding_repeated_twice: Any

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._learned()
        if self.padding_mode == "zeros":
            return self._convolve(input, weight, bias, self.padding)
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return self._convolve(padded, weight, bias, 0)


class Conv1d(_Conv, nn.Conv1d):
    """``torch.nn.Conv1d`` with neurons that can be frozen: one per output channel."""


class Conv2d(_Conv, nn.Conv2d):
    """``torch.nn.Conv2d`` with neurons that can be frozen: one per output channel."""


class Conv3d(_Conv, nn.Conv3d):
    """``torch.nn.Conv3d`` with neurons that can be frozen: one per output channel."""


class _ConvTranspose(_AnyConv):
    _output_padding: Any

    @property
    def layout(self) -> NeuronLayout:
        return NeuronLayout(self.groups, axis=1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        return self._convolve(
            input,
            *self._learned(),
            self.padding,
            transposed=True,
            output_padding=tuple(output_padding),
        )


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with neurons that can be frozen: one per output channel."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with neurons that can be frozen: one per output channel."""


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with neurons that can be frozen: one per output channel."""


class _Norm(NeuronLayer):
    is_norm = True

    def channel_dim(self, output: Tensor) -> int:
        return 1

    def forward(self, input: Tensor) -> Tensor:
        """The stock layer, run on a scale and shift whose gradients are masked."""
        channels = self.channels
        weight, bias = self._learned()
        if not functional.learns(weight, bias):
            return self._anchored(self._normalize(input, weight, bias))
        if all_active(channels, input):
            return self._anchored(watched(self._normalize(input, weight, bias), channels))
        return self._anchored(self._normalize(input, *functional.affine(weight, bias, channels)))

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class LayerNorm(_Norm, nn.LayerNorm):
    """``torch.nn.LayerNorm`` over one dimension: one neuron per normalised feature."""

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(_Norm, nn.GroupNorm):
    """``torch.nn.GroupNorm`` with neurons that can be frozen: one per channel's scale and shift."""

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class _BatchNorm(_Norm, nn.modules.batchnorm._BatchNorm):
    """Running statistics are updated as ever: they are no parameters."""

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            weight,
            bias,
            batch_statistics,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with neurons that can be frozen: one per channel."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with neurons that can be frozen: one per channel."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with neurons that can be frozen: one per channel."""


class FollowingParameters:
    """Parameters no neuron owns (class tokens, layer scales, position tables) that stop learning
    while every neuron of their block is frozen.

    Two forward hooks of the block put detached aliases in their places for the length of its
    forward; the parameter objects themselves are never touched. Attention inside it has two more.

    Args:
        block: the module whose neurons decide.
        layers: its neuron layers.
        places: (module, name) of each parameter.
        stopped: shared by all layers of the model.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: list[NeuronLayer],
        places: list[tuple[nn.Module, str]],
        stopped: StoppedParameters,
    ) -> None:
        self._layers, self._places, self._stopped = layers, places, stopped
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
        return all(layer.channels.stopped for layer in self._layers)

    def _before_forward(self, block: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled() or self._aside:
            return
        if torch.compiler.is_compiling():
            if not self._layers[0].specialized or in_process_group() or not self._stops():
                return
        elif not self._stops():
            return
        elif in_process_group():
            self._stopped.add(self.parameters)
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
        """Attention that no gradient reaches runs in no_grad, on aliases that ask for a gradient:
        where nothing does, PyTorch projects a batch-first input by many small products."""
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


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def named_neuron_layers(model: nn.Module) -> Iterator[tuple[str, NeuronLayer]]:
    """The converted layers of ``model`` (wrappers seen through), in ``named_modules`` order."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, NeuronLayer):
            yield name, module


def following_parameters(model: nn.Module) -> Iterator[FollowingParameters]:
    """The parameters that follow their block (``convert(..., others="follow")``)."""
    for module in unwrap(model).modules():
        if "neq_following" in module.__dict__:
            yield module.__dict__["neq_following"]


def neuron_owners(model: nn.Module) -> Owners:
    """Every parameter that neurons own: who decides about it, and where each neuron lies in it."""
    owners: Owners = {}
    for _, layer in named_neuron_layers(model):
        for parameter, layout in layer.neuron_parameters():
            owner = (layer.channels, layout)
            known = owners.setdefault(parameter, [])
            if owner not in known:
                known.append(owner)
    for following in following_parameters(model):
        for parameter in following.parameters:
            owners.setdefault(parameter, []).append((following.channels, WHOLE_PARAMETER))
    return owners
