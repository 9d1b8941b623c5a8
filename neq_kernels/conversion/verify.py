"""Find parameters whose gradient is computed dense although their layer was converted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neq_kernels.layers.traversal import Owners, neuron_layers, neuron_owners, unwrap
from neq_kernels.measure.recorder import LayerCall, Recorder

_PASSES = 2
_NOISE = 0.5


class DenseGradients(list[str]):
    """Names of parameters, with what their weight gradients cost; printed as a table.

    Attributes:
        macs: by name, the MACs of a forward of the example that multiply by the parameter; 0 where
            it is only added, scaled by or looked up.
        total_macs: of all products with a parameter in that forward.
    """

    def __init__(
        self, names: Iterable[str], macs: Mapping[str, int] | None = None, total_macs: int = 0
    ) -> None:
        super().__init__(names)
        self.macs = {name: (macs or {}).get(name, 0) for name in self}
        self.total_macs = total_macs

    @property
    def share(self) -> float:
        """Their share of all these MACs: 0 to 1."""
        return sum(self.macs.values()) / self.total_macs if self.total_macs else 0.0

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        rows = [f"{name:<{width}}  {self.macs[name]:,} MACs" for name in self]
        return "\n".join([*rows, f"computed dense: {self.share:.1%} of {self.total_macs:,} MACs"])


def verify(model: nn.Module, example_input: Any) -> DenseGradients:
    """Run backwards with half of every layer frozen, and list the parameters whose gradient was
    computed dense all the same: no neuron owns them, or the model uses them without calling their
    layer.

    The model runs in the mode it is in, in eval mode and in train mode (where it can), each twice,
    with noise on its parameters: a projection that starts at zero, or a layer that is skipped at
    random, hides nothing. That takes the memory of a second set of parameters.

    Args:
        model: a converted model.
        example_input: a tensor, a tuple or list (positional arguments) or a dict (keywords).

    Returns:
        Parameter names, in the model's order, and their MACs. Parameters, masks, gradients,
        buffers, modes and the RNG are left as found.

    Raises:
        ValueError: the model has no neuron layers, or its output needs no gradient.
    """
    inner = unwrap(model)
    layers = neuron_layers(inner)
    recorder = Recorder(inner)
    found: set[str] = set()
    with _left_as_found(inner):
        for channels in {id(layer.channels): layer.channels for layer in layers}.values():
            channels.set(torch.arange((len(channels) + 1) // 2, device="cpu"))
        owners = neuron_owners(inner, following=False)
        for i, mode in enumerate(_modes(inner)):
            if mode is not None:
                inner.train(mode)
            for _ in range(_PASSES):
                # Some models refuse another mode than the one they are in.
                with contextlib.suppress(Exception) if i else contextlib.nullcontext():
                    with _noise_on_parameters(inner):
                        _backward_of_everything(inner, example_input, recorder)
                    found.update(_dense(inner, owners))
    names = [name for name, _ in inner.named_parameters() if name in found]
    return DenseGradients(names, *_macs(inner, recorder.calls, owners))


def _modes(model: nn.Module) -> list[bool | None]:
    """None for the mode the model is in."""
    training = {module.training for module in model.modules()}
    return [None, *(mode for mode in (False, True) if training != {mode})]


def _dense(model: nn.Module, owners: Owners) -> Iterator[str]:
    """Names of the parameters with a gradient in what all their owners have frozen."""
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            continue
        frozen = torch.ones(grad.shape, dtype=torch.bool, device=grad.device)
        for channels, layout in owners.get(parameter, []):
            layout.fill_(frozen, channels.active.to(grad.device), False)
        grad = grad.to_dense() if grad.is_sparse else grad
        if parameter not in owners or bool(grad.ne(0).logical_and_(frozen).any()):
            yield name


def _macs(model: nn.Module, calls: list[LayerCall], owners: Owners) -> tuple[dict[str, int], int]:
    """MACs by parameter, of calls whose weight gradient is dense; and of all products."""
    names = {p: name for name, p in model.named_parameters()}
    macs: dict[str, int] = {}
    products = [call for call in calls if call.kind != "norm"]
    for call in products:
        parameter = call.parameter
        if parameter is not None and (call.bypasses or parameter not in owners):
            macs[names[parameter]] = macs.get(names[parameter], 0) + call.macs
    return macs, sum(call.macs for call in products)


class _left_as_found:
    """Masks, gradients, buffers, modes and RNG of a model, put back on exit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._masks = {layer.channels: layer.channels.mask for layer in neuron_layers(self._model)}
        self._grads = [(p, p.grad) for p in self._model.parameters()]
        self._buffers = [(b, b.clone()) for b in self._model.buffers()]
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._rng = torch.random.fork_rng()
        self._rng.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._rng.__exit__(*exception)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for parameter, grad in self._grads:
            parameter.grad = grad
        for module, mode in self._modes:
            module.training = mode
        for channels, mask in self._masks.items():
            channels.set(mask)


@contextlib.contextmanager
def _noise_on_parameters(model: nn.Module) -> Iterator[None]:
    """As much as keeps activations in range; no parameter object or version changes."""
    values = [(p, p.data) for p in model.parameters()]
    try:
        for parameter, value in values:
            parameter.grad = None
            if value.is_floating_point():
                fan_in = max(1, value[:1].numel()) if value.dim() > 1 else 4
                parameter.data = value + torch.randn_like(value) * (_NOISE / fan_in**0.5)
        yield
    finally:
        for parameter, value in values:
            parameter.data = value


def _backward_of_everything(model: nn.Module, example: Any, recorder: Recorder) -> None:
    """Recorded the first time."""
    args: tuple[Any, ...] = (example,)
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    seen = recorder.calls
    with torch.enable_grad():
        with contextlib.nullcontext() if seen else recorder.watching(example):
            leaves = tree_leaves(model(*args, **kwargs))
        outputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError("model: expected an output that needs a gradient, got none")
        # A random weighting: a plain sum has zero gradient below a softmax or a norm.
        total = sum((t.float() * torch.randn_like(t, dtype=torch.float32)).sum() for t in outputs)
    assert isinstance(total, Tensor)
    total.backward()
