"""Find parameters whose gradient is computed dense although their layer was converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neq_kernels.layers.traversal import neuron_layers, unwrap


def verify(model: nn.Module, example_input: Any) -> list[str]:
    """Run one backward with half of every layer frozen, and list the parameters whose gradient was
    computed dense all the same: no neuron owns them, or the model uses them without calling their
    layer.

    Args:
        model: a converted model.
        example_input: a tensor, a tuple or list (positional arguments) or a dict (keywords).

    Returns:
        Parameter names. Masks, gradients, buffers, modes and the RNG are left as found.

    Raises:
        ValueError: the model has no neuron layers, or its output needs no gradient.
    """
    inner = unwrap(model)
    owned = {
        id(parameter): (channels, layout)
        for layer in neuron_layers(inner)
        for parameter, channels, layout in layer.owners()
    }
    with _left_as_found(inner):
        for channels in {layer.channels for layer in neuron_layers(inner)}:
            channels.set(torch.arange((len(channels) + 1) // 2, device="cpu"))
        _backward_of_everything(inner, example_input)
        dense = []
        for name, parameter in inner.named_parameters():
            if parameter.grad is None:
                continue
            if id(parameter) not in owned:
                dense.append(name)
                continue
            channels, layout = owned[id(parameter)]
            frozen = channels.frozen.to(parameter.device)
            if len(frozen) and bool(layout.gather(parameter.grad, frozen).ne(0).any()):
                dense.append(name)
    return dense


class _left_as_found:
    """Masks, gradients, buffers and RNG of a model, put back on exit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._masks = {layer.channels: layer.channels.mask for layer in neuron_layers(self._model)}
        self._grads = [(p, p.grad) for p in self._model.parameters()]
        self._buffers = [(b, b.clone()) for b in self._model.buffers()]
        self._rng = torch.random.fork_rng()
        self._rng.__enter__()
        for parameter, _ in self._grads:
            parameter.grad = None

    def __exit__(self, *exception: Any) -> None:
        self._rng.__exit__(*exception)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for parameter, grad in self._grads:
            parameter.grad = grad
        for channels, mask in self._masks.items():
            channels.set(mask)


def _backward_of_everything(model: nn.Module, example: Any) -> None:
    args: tuple[Any, ...] = (example,)
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    with torch.enable_grad():
        leaves = tree_leaves(model(*args, **kwargs))
        outputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise ValueError("model: expected an output that needs a gradient, got none")
        # A random weighting: a plain sum has zero gradient below a softmax or a norm.
        total = sum((t.float() * torch.randn_like(t, dtype=torch.float32)).sum() for t in outputs)
    assert isinstance(total, Tensor)
    total.backward()
