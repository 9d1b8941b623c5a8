"""Record in one forward which neuron layers lie below each use of a parameter, and which is the
first above it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_COPIES = (_aten._to_copy, _aten.to, _aten.clone, _aten.contiguous)


class Dataflow(TorchDispatchMode):
    """While it is entered, every tensor carries the set of layers and of uses it depends on.

    It watches the operators below autograd, so it does not matter whether gradients are recorded,
    and it follows data, not module nesting. A *use* is an operator that reads a parameter itself;
    casts and views of a parameter are the parameter.

    Args:
        layers: neuron layers, each with its bits.
        parameters: parameters to watch.

    Attributes:
        called: the bits of all layers that were called.
    """

    supports_higher_order_operators = True  # flex attention

    def __init__(self, layers: Mapping[nn.Module, int], parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called = 0
        self._layers = layers
        self._all_layers = 0
        for bits in layers.values():
            self._all_layers |= bits
        # Weak references keep the addresses of storages from being used again, not their memory.
        self._storages: dict[int, StorageWeakRef] = {}
        self._carried: dict[int, int] = {}
        self._parameters: dict[int, set[int]] = {}
        for parameter in parameters:
            self._parameters.setdefault(self._key(parameter), set()).add(id(parameter))
        self._uses: dict[int, list[int]] = {}
        self._below: dict[int, int] = {}
        self._next_use = 1 << self._all_layers.bit_length()
        self._waiting = 0
        self._inputs: set[int] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> Dataflow:
        for layer in self._layers:
            self._hooks += [
                layer.register_forward_pre_hook(self._before, with_kwargs=True),
                layer.register_forward_hook(self._after),
            ]
        # What is compiled runs as it is written: no mode sees into a compiled region.
        self._eager = torch.compiler.set_stance("force_eager")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._eager.__exit__(*exception)

    def below(self, parameter: Tensor) -> list[int | None]:
        """For each use of ``parameter``: the bits of the first layer that the use feeds, in the
        order of the calls, and of all layers below that; None if it feeds no layer."""
        return [self._below.get(use) for use in self._uses.get(id(parameter), [])]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, carried = set[int](), 0
        for tensor in _tensors((args, kwargs)):
            key = self._key(tensor)
            read |= self._parameters.get(key, set()) - self._inputs
            carried |= self._carried.get(key, 0)
        for key in {self._key(t) for t in _tensors(out) if t.is_floating_point() or t.is_complex()}:
            if key in self._parameters:
                continue
            if read and not carried and getattr(func, "overloadpacket", None) in _COPIES:
                self._parameters[key] = read
                continue
            while read:
                carried |= self._used(read.pop())
            self._carried[key] = self._carried.get(key, 0) | carried
        return out

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        bits, carried = self._layers[layer], 0
        for tensor in _tensors((args, kwargs)):
            key = self._key(tensor)
            carried |= self._carried.get(key, 0)
            for parameter in self._parameters.get(key, ()):
                self._inputs.add(parameter)
                carried |= self._used(parameter)
        fed = carried & self._waiting
        self._waiting &= ~fed
        while fed:
            use = fed & -fed
            self._below[use] = (carried & self._all_layers) | bits
            fed &= ~use
        self.called |= bits

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._inputs.clear()
        for tensor in _tensors(output):
            key = self._key(tensor)
            self._carried[key] = self._carried.get(key, 0) | self._layers[layer]

    def _used(self, parameter: int) -> int:
        use, self._next_use = self._next_use, self._next_use << 1
        self._uses.setdefault(parameter, []).append(use)
        self._waiting |= use
        return use

    def _key(self, tensor: Tensor) -> int:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, for example
            return id(tensor)
        key: int = storage._cdata
        if key not in self._storages:
            self._storages[key] = StorageWeakRef(storage)
        return key


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
