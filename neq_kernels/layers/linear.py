"""Linear layers with neurons that can be frozen."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from neq_kernels import functional
from neq_kernels.channels import NeuronLayout
from neq_kernels.layers.base import NeuronLayer, constructible


@constructible
class Linear(NeuronLayer, nn.Linear):
    """``torch.nn.Linear`` with neurons that can be frozen: one per output feature."""

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._traced(input)
        weight, bias = self._learned()
        out = functional.linear(input, weight, bias, self.channels, grad_input=self.grad_input)
        return self._anchored(out)


class TransposedLinear(NeuronLayer):
    """A linear layer that stores its weight as ``[in, out]`` (transformers' ``Conv1D``)."""

    @classmethod
    def layout_in(cls, layer: nn.Module) -> NeuronLayout:
        return NeuronLayout(axis=1)

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return self._traced(x)
        weight, bias = self._learned()
        rows = x.view(-1, x.size(-1))
        out = functional.linear(rows, weight.t(), bias, self.channels, grad_input=self.grad_input)
        return self._anchored(out).view(*x.size()[:-1], out.size(-1))
