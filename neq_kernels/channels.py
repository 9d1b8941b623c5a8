"""Which output channels are updated, and where each of them lies in a parameter."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeuronLayout:
    """Where neuron ``k`` of ``K`` lies in a parameter.

    The parameter is cut along dimension 0 into ``groups`` equal parts; inside a part, dimension
    ``axis`` enumerates the ``K / groups`` neurons of that group. ``axis=None`` makes the whole
    parameter one neuron.

    - Linear, Conv, norm layers, every bias: ``NeuronLayout()``, neuron ``k`` is row ``k``.
    - ConvTranspose, weight ``(Cin, Cout/groups, ...)``: ``NeuronLayout(groups, axis=1)``.
    """

    groups: int = 1
    axis: int | None = 0

    def n_neurons(self, tensor: Tensor) -> int:
        """Number of neurons ``K`` in ``tensor``."""
        return 1 if self.axis is None else self.groups * tensor.shape[self.axis]

    def rows(self, tensor: Tensor) -> Tensor:
        """A strided view ``[K, ...]`` (``groups == 1``) or ``[groups, K/groups, ...]``."""
        if self.axis is None:
            return tensor.unsqueeze(0)
        if self.groups == 1:
            return tensor.movedim(self.axis, 0)
        # Unlike unflatten, view has a rule for batched gradients.
        parts = tensor.view(self.groups, tensor.shape[0] // self.groups, *tensor.shape[1:])
        return parts.movedim(self.axis + 1, 1)

    def gather(self, tensor: Tensor, neurons: Tensor) -> Tensor:
        """Copy of the given neurons (int64 indices), shape ``[len(neurons), ...]``."""
        return self.rows(tensor)[self._index(tensor, neurons)]

    def scatter_(self, tensor: Tensor, neurons: Tensor, values: Tensor) -> None:
        """Write ``values`` (shape of :meth:`gather`'s result) over the given neurons, in place."""
        self.rows(tensor)[self._index(tensor, neurons)] = values

    def fill_(self, tensor: Tensor, neurons: Tensor, value: float) -> None:
        """Fill the given neurons with ``value``, in place."""
        self.rows(tensor)[self._index(tensor, neurons)] = value

    def spread(self, mask: Tensor, tensor: Tensor) -> Tensor:
        """A mask of neurons, bool[K], in a shape that broadcasts to ``tensor``: for each element
        that of its neuron."""
        if mask.shape == tensor.shape:
            return mask
        if self.axis is None:
            return mask.view((1,) * tensor.dim())
        shape = [1] * tensor.dim()
        shape[self.axis] = tensor.shape[self.axis]
        if self.groups == 1:
            return mask.view(shape)
        parts = mask.view(self.groups, 1, *shape[1:])
        return parts.expand(-1, tensor.shape[0] // self.groups, *shape[1:]).flatten(0, 1)

    def blocks(self, tensor: Tensor) -> tuple[int, int, int, int] | None:
        """``(groups, outer, per_group, inner)`` such that element ``i`` of part ``o`` of neuron
        ``(g, j)`` is at memory offset ``((g * outer + o) * per_group + j) * inner + i``.

        None when ``tensor`` is not dense in memory in an order this can describe (contiguous, or
        channels_last in any number of dimensions).
        """
        neurons = self.n_neurons(tensor)
        per_group = neurons // self.groups
        if tensor.is_contiguous():
            if self.axis is None:
                return 1, 1, 1, tensor.numel()
            outer = math.prod(tensor.shape[: self.axis]) // (self.groups if self.axis else 1)
            return self.groups, outer, per_group, math.prod(tensor.shape[self.axis + 1 :])
        if tensor.dim() < 3 or not tensor.movedim(1, -1).is_contiguous():
            return None
        if self.axis is None:
            return 1, 1, 1, tensor.numel()
        if self.axis == 0:
            return 1, 1, per_group, tensor[0].numel()
        outer = tensor.shape[0] // self.groups * math.prod(tensor.shape[2:])
        return self.groups, outer, per_group, 1

    def _index(self, tensor: Tensor, neurons: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.groups == 1:
            return neurons
        per_group = self.n_neurons(tensor) // self.groups
        return neurons.div(per_group, rounding_mode="floor"), neurons % per_group


WHOLE_PARAMETER = NeuronLayout(axis=None)


@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """The active channels of one layer, as kernels on one device read them.

    Attributes:
        order: int64[K] on that device: the active channels ascending, then the frozen ones.
        count: int32[1] on that device: the number of active channels.
        n: the same number as the host knows it; K while a CUDA graph is captured, where only
            ``count`` holds.
        start: the first active channel when the active ones are neighbours, else -1.
        dense: PyTorch's kernel computes the gradient, whichever would be chosen.
    """

    order: Tensor
    count: Tensor
    n: int
    start: int
    dense: bool = False


class ActiveChannels:
    """The set of active (updated) output channels of one layer. True means active.

    The truth is a host-side bool mask; it is no buffer and does not move with the module. What
    kernels read is derived from it and refreshed in place by :meth:`set`, so addresses and sizes
    never change:

    - ``mask_on``: bool[K], the mask itself;
    - ``order``: int64[K], the active channels ascending, then the frozen ones ascending;
    - ``count``: int32[1] on the same device, the number of active channels;
    - ``host_count``: int32[2] on the CPU, ``(n_active, start)``; ``start`` is the first active
      channel when the active ones form one contiguous run, else -1.

    Args:
        n_channels: K, at least 1. All channels start active.
    """

    # Whether eager code has computed with them: what they own is used by way of its layer.
    called = False

    def __init__(self, n_channels: int) -> None:
        if isinstance(n_channels, bool) or not isinstance(n_channels, int):
            raise TypeError(f"n_channels: expected an int, got {type(n_channels).__name__}")
        if n_channels < 1:
            raise ValueError(f"n_channels: expected at least 1, got {n_channels}")
        self._generation = 0
        self._n_channels = n_channels
        self._n_active = n_channels
        self._start = 0
        # Apart from the count: compiled code may be specialised on it, and on nothing else.
        self._none_active = False
        # What others have derived from the present set; emptied when it changes.
        self.plans: dict[Hashable, Any] = {}
        self._plans_otherwise: dict[Hashable, Any] = {}  # where served_densely is not what it is
        self._dense_with: Sequence[ActiveChannels] = ()
        self._values: dict[torch.device, Active] = {}
        self._parts: dict[tuple[int, int], ActiveChannels] = {}
        cpu = torch.device("cpu")
        with torch.inference_mode(False):  # else set() could not refresh them outside it
            self._mask = {cpu: torch.ones(n_channels, dtype=torch.bool, device=cpu)}
            self._host_count = torch.tensor([n_channels, 0], dtype=torch.int32, device=cpu)
            self._order = {cpu: torch.arange(n_channels, dtype=torch.int64, device=cpu)}
            self._count = {cpu: torch.tensor([n_channels], dtype=torch.int32, device=cpu)}

    def __len__(self) -> int:
        return self._n_channels

    def __getstate__(self) -> dict[str, Any]:
        derived: dict[str, Any] = {"plans": {}, "_plans_otherwise": {}, "_values": {}}
        return {**self.__dict__, **derived, "_dense_with": ()}

    def __repr__(self) -> str:
        return f"ActiveChannels(active={self._n_active}/{len(self)})"

    @property
    def mask(self) -> Tensor:
        """A copy of the mask: bool[K] on the CPU, True where active."""
        return self._mask[torch.device("cpu")].clone()

    @property
    def n_active(self) -> int:
        """K', the number of active channels."""
        return self._n_active

    @property
    def start(self) -> int:
        """The first active channel when the active ones are neighbours, else -1."""
        return self._start

    @property
    def none_active(self) -> bool:
        """Whether no channel is active."""
        return self._none_active

    @property
    def generation(self) -> int:
        """Grows by one each time the mask really changes."""
        return self._generation

    @property
    def active(self) -> Tensor:
        """The active channels, int64[K'] on the CPU, ascending."""
        return self._order[torch.device("cpu")][: self._n_active]

    @property
    def frozen(self) -> Tensor:
        """The frozen channels, int64[K - K'] on the CPU, ascending."""
        return self._order[torch.device("cpu")][self._n_active :]

    @property
    def host_count(self) -> Tensor:
        return self._host_count

    def on(self, device: torch.device) -> Active:
        """What kernels on ``device`` are told, made once for each set of active channels."""
        value = self._values.get(device)
        if value is None:
            value = Active(
                *(self.order(device), self.count(device), self._n_active, self._start),
                dense=self.served_densely,
            )
            self._values[device] = value
        return value

    @property
    def served_densely(self) -> bool:
        """Whether PyTorch's dense kernels compute the weight gradients of eager calls."""
        return bool(self._dense_with)

    def serve_densely(self, together: Sequence[ActiveChannels]) -> None:
        """Let PyTorch's dense kernels compute the weight gradients of eager calls, whichever would
        be chosen, until one of ``together`` changes; ``()`` ends it. What was planned for either
        way is kept. Copies are not served so."""
        if bool(together) != self.served_densely:
            self.plans, self._plans_otherwise = self._plans_otherwise, self.plans
            self._values.clear()
        self._dense_with = together
        for part in self._parts.values():
            part.serve_densely(together)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(order, count, host_count)`` for an operator on ``device``."""
        return self.order(device), self.count(device), self._host_count

    def mask_on(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask on ``device`` (cached; copied there on first use); not to be changed."""
        return self._on(device, self._mask)

    def order(self, device: torch.device | str = "cpu") -> Tensor:
        """``order`` on ``device`` (cached; copied there on first use)."""
        return self._on(device, self._order)

    def count(self, device: torch.device | str = "cpu") -> Tensor:
        """``count`` on ``device`` (cached; copied there on first use)."""
        return self._on(device, self._count)

    def _on(self, device: torch.device | str, copies: dict[torch.device, Tensor]) -> Tensor:
        copy = copies.get(device)  # type: ignore[arg-type]
        if copy is not None:
            return copy
        device = torch.device(device)
        if device.type == "meta":
            return torch.empty_like(copies[torch.device("cpu")], device=device)
        if device not in copies:
            self.prepare(device)
        return copies[device]

    def prepare(self, device: torch.device) -> None:
        """Make the tensors that kernels on ``device`` read (nothing to do on ``meta``)."""
        if device.type == "meta" or device in self._order:
            return
        cpu = torch.device("cpu")
        with torch.inference_mode(False):
            self._mask[device] = self._mask[cpu].to(device)
            self._order[device] = self._order[cpu].to(device)
            self._count[device] = self._count[cpu].to(device)
        for part in self._parts.values():
            part.prepare(device)

    def part(self, start: int, stop: int) -> ActiveChannels:
        """The channels ``start`` to ``stop`` as a set of their own, for a product that computes
        these alone. It follows this one: call ``set`` here, not there."""
        if (start, stop) not in self._parts:
            part = ActiveChannels(stop - start)
            part.set(self.mask[start:stop])
            for device in self._order:
                part.prepare(device)
            part.serve_densely(self._dense_with)
            self._parts[start, stop] = part
        return self._parts[start, stop]

    def set(self, mask_or_indices: Tensor | Sequence[bool] | Sequence[int]) -> None:
        """Choose the active channels.

        Args:
            mask_or_indices: a bool mask of length K (True where active), or int32/int64 indices
                of the active channels, in any order. A device tensor is copied to the host once.

        Raises:
            TypeError: any other dtype.
            ValueError: wrong length or rank, an index out of range, negative or twice.
        """
        mask = self._as_mask(mask_or_indices)
        if torch.equal(mask, self._mask[torch.device("cpu")]):
            return
        active, frozen = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        n = len(active)
        is_run = n > 0 and int(active[-1]) - int(active[0]) == n - 1
        self._n_active = n
        self._start = int(active[0]) if is_run else -1
        self._none_active = n == 0
        self._generation += 1
        for channels in self._dense_with:
            channels.serve_densely(())
        self.plans.clear()
        self._plans_otherwise.clear()
        self._values.clear()
        self._host_count.copy_(torch.tensor([n, self._start], device="cpu"))
        order = torch.cat([active, frozen])
        for tensor in self._mask.values():
            tensor.copy_(mask)
        for tensor in self._order.values():
            tensor.copy_(order)
        for tensor in self._count.values():
            tensor.fill_(n)
        for (start, stop), part in self._parts.items():
            part.set(mask[start:stop])

    def reset(self) -> None:
        """Make every channel active."""
        self.set(torch.ones(len(self), dtype=torch.bool, device="cpu"))

    def _as_mask(self, value: Tensor | Sequence[bool] | Sequence[int]) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, device="cpu")
            if value.numel() == 0:
                value = value.to(torch.int64)
        value = value.detach().to("cpu")
        k = len(self)
        if value.dim() != 1:
            raise ValueError(
                f"mask_or_indices: expected one dimension, got shape {tuple(value.shape)}"
            )
        if value.dtype == torch.bool:
            if len(value) != k:
                raise ValueError(f"mask: expected length {k}, got {len(value)}")
            return value.clone()
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"mask_or_indices: expected bool, int32 or int64, got {value.dtype}")
        if len(value) and (int(value.min()) < 0 or int(value.max()) >= k):
            raise ValueError(
                f"indices: expected 0 <= index < {k}, got {int(value.min())}..{int(value.max())}"
            )
        mask = torch.zeros(k, dtype=torch.bool, device="cpu")
        mask[value.long()] = True
        if int(mask.sum()) != len(value):
            raise ValueError(f"indices: expected no duplicates, got {value.tolist()}")
        return mask
