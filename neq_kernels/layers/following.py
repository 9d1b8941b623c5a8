"""Parameters that no neuron owns stop learning with what lies below them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from neq_kernels.autograd.call_state import unplanned
from neq_kernels.channels import ActiveChannels
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.dataflow import Dataflow
from neq_kernels.process_group import in_process_group

# A layer that is skipped at random is met sooner or later.
_MOST_RECORDINGS = 8


class Following:
    """What the following parameters of one model have in common.

    Sets of layers are integers: bit ``i`` stands for the layers of ``channels[i]``.

    Args:
        channels: of all neuron layers of the model.
        anchor: shared by all layers of the model.

    Attributes:
        specialized: as :attr:`NeuronLayer.specialized`.
        generation: grows when a recorded forward has shown more.
    """

    specialized = False

    def __init__(self, channels: list[ActiveChannels], anchor: ParameterAnchor) -> None:
        self._bit = {c: 1 << i for i, c in enumerate(channels)}
        self.anchor = anchor
        self.generation = 0
        self._running: nn.Module | None = None
        self._active = -1
        self._recording: Dataflow | None = None
        self._called = {False: 0, True: 0}
        self._recorded = {False: 0, True: 0}

    def layers_in(self, module: nn.Module) -> int:
        """The set of the neuron layers in ``module``, itself one of them if it is."""
        layers = 0
        for layer in module.modules():
            if isinstance(layer, NeuronLayer):
                layers |= self._bit[layer.channels]
        return layers

    def active(self) -> int:
        """The set of layers with an active neuron."""
        active = 0
        for channels, bit in self._bit.items():
            if not channels.none_active:
                active |= bit
        return active

    def same_layers(self, other: Following) -> bool:
        """Whether the sets of both mean the same."""
        return list(self._bit) == list(other._bit)

    def keep(self, other: Following) -> None:
        """Keep what forwards have shown to another."""
        self._recorded, self._called = other._recorded, other._called

    def watch(self, module: nn.Module, whole: bool) -> list[Any]:
        """Let the forward of ``module`` be one in which parameters stop; ``whole``: it runs all
        layers of the model, so that it can be recorded. Returns hook handles."""
        if not whole:
            return [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        return [
            module.register_forward_pre_hook(self._enter_and_record),
            module.register_forward_hook(self._learn),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def set_aside(self, follower: Follower) -> bool:
        """Whether the parameter that is read now takes part as a constant."""
        if not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():
            return self.specialized and not in_process_group() and follower.stops(self.active())
        if self._running is None and torch._C._current_graph_task_id() == -1:
            return False  # user code outside a forward, and no recomputation in a backward
        return follower.stops(self._active) and not unplanned()

    def _enter(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        # The same module again: its last forward was interrupted.
        if self._running is None or self._running is module:
            self._running, self._active = module, self.active()

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling() and self._running is module:
            self._stop_recording()
            self._running = None

    def _enter_and_record(self, module: nn.Module, args: object) -> None:
        self._enter(module, args)
        if torch.compiler.is_compiling() or self._running is not module or unplanned():
            return
        if getattr(module, "_is_replica", False):  # of DataParallel, in a thread
            return
        self._stop_recording()
        missing = (1 << len(self._bit)) - 1 & ~self._called[module.training]
        recorded = self._recorded[module.training]
        if recorded == 0 or (missing and recorded < _MOST_RECORDINGS):
            layers: dict[nn.Module, int] = {
                m: self.layers_in(m) for m in module.modules() if isinstance(m, NeuronLayer)
            }
            self._recording = Dataflow(layers, [f.parameter for f in followers(module)])
            self._recording.__enter__()

    def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None

    def _learn(self, module: nn.Module, args: object, output: object) -> None:
        recording = self._recording
        if torch.compiler.is_compiling() or self._running is not module or recording is None:
            return
        self._recorded[module.training] += 1
        self._called[module.training] |= recording.called
        self.generation += 1
        for follower in followers(module):
            for below in recording.below(follower.parameter):
                follower.used(below)


class Follower:
    """One parameter that follows.

    Args:
        module, name: where it is.
        following: the model's.
    """

    def __init__(self, module: nn.Module, name: str, following: Following) -> None:
        self.module, self.name, self.following = module, name, following
        self._block, self._outermost = 0, False
        self._prefix = 0
        self._feeds_output = False
        self._channels = ActiveChannels(1)

    @property
    def parameter(self) -> Parameter:
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter

    @property
    def channels(self) -> ActiveChannels:
        """One channel: active while the parameter learns."""
        self._channels.set([not self.stops(self.following.active())])
        return self._channels

    def read(self, parameter: Tensor) -> Tensor:
        """``parameter`` as a forward sees it: itself, or a constant while it has stopped."""
        if not parameter.requires_grad or not self.following.set_aside(self):
            return parameter
        if not torch.compiler.is_compiling():
            self.following.anchor.stopped = True
            if in_process_group():
                self.following.anchor.add((self.parameter,))
        return parameter.detach()

    def belongs_to(self, block: int, outermost: bool) -> None:
        """The nearest module around it that has layers has these; ``outermost``: it is the model,
        and these are all layers but the last."""
        self._block |= block
        self._outermost |= outermost

    def used(self, below: int | None) -> None:
        """A forward has used the parameter: above it comes no layer any more (None), or first the
        last of ``below``."""
        if below is None:
            self._feeds_output = True
        else:
            self._prefix |= below

    def keep(self, other: Follower) -> None:
        """Keep what forwards have shown to another."""
        self._prefix, self._feeds_output = other._prefix, other._feeds_output

    def stops(self, active: int) -> bool:
        """Whether the parameter stops while the layers of ``active`` have active neurons."""
        if self._feeds_output:
            return False
        if self._prefix and not active & self._prefix:
            return True
        if self._prefix and self._outermost:
            return False
        return self._block != 0 and not active & self._block


class _Read:
    """Reads a parameter of a module.

    Every read of a forward comes here, wherever it runs: in a block that is iterated and never
    called, or again in the recomputation of a checkpoint.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        parameter = module._parameters.get(self._name)
        if parameter is None:
            return nn.Module.__getattr__(module, self._name)
        follower = module.__dict__.get("neq_following", {}).get(self._name)
        return parameter if follower is None else follower.read(parameter)


def _flat_weights(module: Any) -> list[Tensor]:
    """The list from which a recurrent layer reads its weights."""
    own: list[Tensor] = module.__dict__["_flat_weights"]
    following = module.__dict__.get("neq_following", {})
    names: list[str] = module._flat_weights_names
    read = [following[n].read(w) if n in following else w for n, w in zip(names, own, strict=True)]
    # The layer writes into its own list.
    return own if all(map(operator.is_, read, own)) else read


def _set_flat_weights(module: nn.Module, weights: list[Tensor]) -> None:
    module.__dict__["_flat_weights"] = weights


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def following_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """``kind``, whose parameters of these names follow: made once."""
    if (kind, names) not in _CLASSES:
        _CLASSES[kind, names] = _following_class(kind, names)
    return _CLASSES[kind, names]


def _following_class(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:

    def reduce(module: nn.Module, protocol: Any) -> Any:
        """By the original class: this one cannot be imported."""
        module.__class__ = kind
        try:
            reduced: Any = module.__reduce_ex__(max(int(protocol), 2))
        finally:
            module.__class__ = made
        function, arguments, *rest = reduced
        return _new, (names, function, arguments), *rest

    if issubclass(kind, nn.RNNBase):
        body: dict[str, Any] = {"_flat_weights": property(_flat_weights, _set_flat_weights)}
    else:
        body = {name: _Read(name) for name in names}
    body |= {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": reduce,
        "neq_original_class": kind,
    }
    made: type[nn.Module] = type(kind)(kind.__name__, (kind,), body)
    return made


def _new(names: tuple[str, ...], function: Any, arguments: Any) -> nn.Module:
    module: nn.Module = function(*arguments)
    module.__class__ = following_class(type(module), names)
    return module


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` before some of its parameters followed."""
    kind: type[nn.Module] = vars(type(module)).get("neq_original_class", type(module))
    return kind


def followers(model: nn.Module) -> list[Follower]:
    """The parameters of ``model`` that follow."""
    found = (f for m in model.modules() for f in m.__dict__.get("neq_following", {}).values())
    # A parametrization put on top has taken the parameter away.
    return [f for f in dict.fromkeys(found) if f.module._parameters.get(f.name) is not None]
