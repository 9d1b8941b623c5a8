"""What all drop-in subclasses of torch.nn layers have in common: they own an
:class:`ActiveChannels`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from neq_kernels.autograd import arguments
from neq_kernels.autograd.forward import detached
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.checkpoints import checkpointed
from neq_kernels.layers.computed_weights import is_computed, sources
from neq_kernels.layers.replaced_forward import rebind
from neq_kernels.process_group import in_process_group

Watcher = Callable[[Tensor], Tensor | None]


class NeuronLayer(nn.Module):
    """A layer whose output channels (neurons) can be frozen one by one.

    Constructed (:mod:`neq_kernels.nn`), or made of a torch.nn layer by
    :func:`neq_kernels.convert`, which changes its class: the result is the same.

    Attributes:
        channels: the active output channels. Layers that share a weight share this object.
        grad_input: ``"exact"`` or ``"active"`` (approximate), see :func:`neq_kernels.convert`.
        specialized: whether ``torch.compile`` may recompile when the layer stops or starts again.
        hold_statistics: whether batch norm, while wholly frozen, normalises by its running
            statistics and leaves them alone.
        anchor: where parameters of wholly frozen layers wait for a data-parallel reducer: the
            model's, or the layer's own until ``convert`` adopts a constructed layer.
    """

    is_norm: ClassVar[bool] = False
    stock: ClassVar[type[nn.Module]]  # in the namespace of every class that convert gives
    is_embedding: ClassVar[bool] = False
    channels: ActiveChannels
    grad_input: arguments.GradInput
    specialized: bool = False
    hold_statistics: bool = False
    anchor: ParameterAnchor

    # torch.nn declares these differently from class to class.
    weight: Any
    bias: Any

    def adopt(
        self, channels: ActiveChannels, grad_input: arguments.GradInput, anchor: ParameterAnchor
    ) -> None:
        """Give the layer its neurons."""
        for parameter, _ in self.neuron_parameters():
            channels.prepare(parameter.device)
        self.channels, self.grad_input, self.anchor = channels, grad_input, anchor

    def release(self) -> None:
        """Undo :meth:`adopt`."""
        for parameter in self.parameters():
            self.anchor.channels_of.pop(parameter, None)
        for name in ("channels", "grad_input", "specialized", "hold_statistics", "anchor"):
            self.__dict__.pop(name, None)

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        """Why a layer of the stock class has no neurons that can be frozen, else None."""
        if layer._parameters.get("weight", layer) is None:
            return "it has no weight (affine=False)"
        for name in ("weight", "bias"):
            if is_computed(layer, name) and sources(layer, name, cls.layout_in(layer)) is None:
                return f"its {name} is computed, neurons from one another (spectral norm, ...)"
        owned = cls.parameters_in(layer)
        if not owned:
            return "it has no weight"
        return reason_against_parameter("weight", owned[0][0])

    @classmethod
    def layout_in(cls, layer: nn.Module) -> NeuronLayout:
        """Where a neuron lies in the weight of a layer, converted or not."""
        return NeuronLayout()

    @classmethod
    def parameters_in(cls, layer: nn.Module) -> list[tuple[Parameter, NeuronLayout]]:
        """:meth:`neuron_parameters` of a layer, converted or not."""
        owned: list[tuple[Parameter, NeuronLayout]] = []
        # Not the attributes, in whose place WeightReads may have put something else.
        for name in ("weight", "bias"):
            parameter = layer._parameters.get(name)
            layout = cls.layout_in(layer) if name == "weight" else NeuronLayout()
            if parameter is not None:
                owned.append((parameter, layout))
            elif is_computed(layer, name):
                owned += sources(layer, name, layout) or []
        return owned

    @classmethod
    def further_parameters_in(cls, layer: nn.Module) -> list[tuple[Parameter, NeuronLayout]]:
        """Those of more sets of neurons that a layer of this kind has."""
        return []

    @property
    def layout(self) -> NeuronLayout:
        """Where a neuron lies in ``weight``."""
        return self.layout_in(self)

    @property
    def n_neurons(self) -> int:
        """How many neurons the layer has: the length of ``channels``."""
        ((parameter, layout), *_) = self.neuron_parameters()
        return layout.n_neurons(parameter)

    def channel_dim(self, output: Tensor) -> int:
        """The dimension of ``output`` that enumerates the neurons."""
        raise NotImplementedError

    def neuron_parameters(self) -> list[tuple[Parameter, NeuronLayout]]:
        """The parameters the neurons own, with the layout of a neuron in each."""
        return self.parameters_in(self)

    def computed(self) -> str | None:
        """The name of a parameter that is computed now, several neurons from one another; None if
        there is none, and frozen neurons can be held."""
        for name in ("weight", "bias"):
            layout = self.layout if name == "weight" else NeuronLayout()
            if is_computed(self, name) and sources(self, name, layout) is None:
                return name
        return None

    def owners(self) -> list[tuple[Parameter, ActiveChannels, NeuronLayout]]:
        """The parameters the neurons own, each with the channels that decide about it: all of the
        layer's, or a part of them."""
        return [(p, self.channels, layout) for p, layout in self.neuron_parameters()]

    def watch(self, watcher: Watcher) -> RemovableHandle:
        """Give every output to ``watcher``, which may replace it, until the handle is removed: of
        several, the first that holds the neurons."""
        return self.register_forward_hook(lambda layer, args, output: self._shown(output, watcher))

    def _shown(self, output: Any, watcher: Watcher) -> Any:
        leaves, structure = tree_flatten(output)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and self._holds_neurons(leaf):
                shown = watcher(leaf)
                if shown is None:
                    return None
                leaves[i] = shown
                return tree_unflatten(leaves, structure)
        return None

    def _holds_neurons(self, output: Tensor) -> bool:
        if not self.shows_neurons:
            return True
        dim = self.channel_dim(output) if output.dim() else -1
        return 0 <= dim < output.dim() and output.shape[dim] == len(self.channels)

    @property
    def shows_neurons(self) -> bool:
        """Whether a dimension of its output enumerates them, so that they can be watched."""
        return not self.is_embedding

    @property
    def learns(self) -> bool:
        """Whether a parameter of its neurons requires a gradient."""
        return any(parameter.requires_grad for parameter, _ in self.neuron_parameters())

    @property
    def qconfig(self) -> Any:
        """What ``torch.ao.quantization`` leaves on every module that it looks at."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        warnings.warn(
            "quantisation knows the classes of torch.nn and leaves the layers of a converted model "
            "as they are; call neq.revert(model) first",
            stacklevel=3,
        )
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]

    def extra_repr(self) -> str:
        active = f"active={self.channels.n_active}/{len(self.channels)}"
        return ", ".join(filter(None, (super().extra_repr(), active)))

    def _traced(self, *args: Any, **kwargs: Any) -> Proxy:
        """The call of this layer in a graph of ``torch.fx``, where it stays the layer it is, as
        those of torch.nn do; an argument is a proxy."""
        tracer = next(a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)).tracer
        name = tracer.path_of_module(self)  # type: ignore[attr-defined]
        return tracer.create_proxy("call_module", name, args, kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        # PyTorch would put what this returns in the layer's place in the user's own model.
        raise RuntimeError(
            f"torch.jit.script: expected layers of torch.nn, got the converted {self}; script a "
            "copy without neurons: torch.jit.script(neq_kernels.revert(copy.deepcopy(model)))"
        )

    def _stops(self) -> bool:
        """Under compile: whether this graph is one in which the layer is wholly frozen."""
        return self.specialized and self.channels.none_active and not in_process_group()

    def _learned(self) -> tuple[Any, Tensor | None]:
        """Weight and bias, as the graph being compiled must see them."""
        own = self._parameters
        if "weight" in own and "bias" in own:  # where Module.__getattr__, too, would find them
            weight, bias = own["weight"], own["bias"]
        else:  # the parameter before the attribute, with which WeightReads may hide it
            weight, bias = (
                own[n] if n in own else getattr(self, n, None) for n in ("weight", "bias")
            )
        if torch.compiler.is_compiling() and self._stops():
            return detached(weight), detached(bias)
        return weight, bias

    def _anchored(self, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return output
        channels = self.channels
        channels.called = True
        none_active = channels.none_active
        if not none_active and not self.anchor.waiting and not self.anchor.stopped:
            return output
        if torch.is_grad_enabled():
            self.anchor.stopped = not output.requires_grad
            if none_active and in_process_group():
                self.anchor.add(p for p, _ in self.neuron_parameters())
            elif none_active and self.anchor.optimizers:
                self.anchor.add_stand_ins([p for p, _ in self.neuron_parameters()])
        elif self.anchor.stopped:
            learning = [] if none_active else [p for p, _ in self.neuron_parameters()]
            self.anchor.stopped = checkpointed(learning)
        return self.anchor.tie(output) if self.anchor.waiting else output

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter, _ in self.neuron_parameters():
            self.channels.prepare(parameter.device)
        return self


def reason_against_parameter(name: str, parameter: Parameter) -> str | None:
    """Why a parameter can hold no neurons, else None."""
    if is_lazy(parameter):
        return "it is lazy; convert it after its first forward"
    if type(parameter).__module__.partition(".")[0] in _QUANTISING:
        return f"its {name} is quantised ({type(parameter).__name__})"
    if not parameter.is_floating_point():
        return f"its {name} is {parameter.dtype}"
    if parameter.numel() == 0:
        return f"its {name} is empty: {tuple(parameter.shape)}"
    return None


# Libraries whose tensor subclasses hold quantised values, whatever their dtype says.
_QUANTISING = {"torchao", "bitsandbytes", "optimum", "quanto", "hqq"}


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer of this class has without its neurons."""
    lineage = (base for base in kind.__mro__ if issubclass(base, nn.Module))
    return next(base for base in lineage if not issubclass(base, NeuronLayer))


def become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a layer in place."""
    rebind(layer, type(layer), kind)
    layer.__class__ = kind


def restore(layer: NeuronLayer) -> None:
    """Give a layer its stock class back, under whatever parametrizations it has."""
    kind = type(layer)
    layer.release()
    if "stock" in vars(kind):
        become(layer, kind.stock)
        return
    stock = stock_class(kind)
    layer.__class__ = type(f"Parametrized{stock.__name__}", (stock,), _own(kind))


def convert_in_place(layer: nn.Module, ours: type[NeuronLayer]) -> NeuronLayer:
    """Give a layer the class ``ours``, under whatever parametrizations it has."""
    kind = type(layer)
    if not parametrize.is_parametrized(layer):
        become(layer, ours)
    else:
        layer.__class__ = type(kind.__name__, (ours,), _own(kind))
    assert isinstance(layer, NeuronLayer)
    return layer


def _own(kind: type) -> dict[str, Any]:
    return {n: value for n, value in vars(kind).items() if n not in ("__dict__", "__weakref__")}


def unparametrized(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer without its parametrizations."""
    kind = type(layer)
    return kind.__bases__[0] if parametrize.is_parametrized(layer) else kind


def restorable(layer: NeuronLayer) -> bool:
    """Whether the class is one that convert gives, or a parametrization of it."""
    kind = vars(type(layer)).get("neq_original_class", type(layer))  # if parameters follow
    made = kind.__bases__[0] if parametrize.is_parametrized(layer) else kind
    return "stock" in vars(made)


L = TypeVar("L", bound=NeuronLayer)


def constructible(kind: type[L]) -> type[L]:
    """Decorate a layer type: it is constructed as its stock class is, with all neurons active.

    The constructor raises ValueError where :func:`neq_kernels.convert` would leave the layer alone.
    """
    stock = stock_class(kind)

    @wraps(stock.__init__)
    def construct(layer: L, /, *args: Any, **kwargs: Any) -> None:
        stock.__init__(layer, *args, **kwargs)
        reason = kind.reason_against(layer)
        if reason is not None:
            name = kind.__name__
            raise ValueError(
                f"neq.nn.{name}: expected neurons that can be frozen, got none: {reason}; "
                f"use {stock.__module__.partition('.modules')[0]}.{name}"
            )
        channels = ActiveChannels(layer.n_neurons)
        layer.adopt(channels, "exact", ParameterAnchor(shared=False))

    kind.__init__ = construct  # type: ignore[method-assign, assignment]
    return kind
