"""The predicted time of a training step on a GPU, dense and with a part of the neurons active.

A product takes what :mod:`benchmarks.matmul_predictor` expects; everything else takes the longer of
its bytes at the memory's bandwidth and its arithmetic at the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.matmul_predictor import Answers, Gemm
from benchmarks.step_work import BYTES, Layer, Product, StepWork, occupied
from neq_kernels import heuristics
from neq_kernels.backends import triton
from neq_kernels.backends.aten import rounded_up
from neq_kernels.measure.shares import LayerShare, StepShares
from neq_kernels.measure.timing import Quantiles
from neq_kernels.problem import Strategy

# SGD with momentum reads parameter, gradient and momentum and writes the first and the last.
_OPTIMIZER_PASSES = 5


@dataclass(frozen=True)
class Gpu:
    """Peaks in bytes and FLOPs per second, from NVIDIA's data sheets ("A100 Tensor Core GPU", "H100
    Tensor Core GPU": SXM, 80 GB, without sparsity).

    Attributes:
        name: in NVIDIA's package.
        bandwidth: of the memory.
        tensor_flops: of 16-bit products in tensor cores.
        vector_flops: of float32 outside them.
    """

    name: str
    bandwidth: float
    tensor_flops: float
    vector_flops: float


GPUS = {
    "A100": Gpu("A100_SXM_80GB", 2.039e12, 312e12, 19.5e12),
    "H100": Gpu("H100_SXM", 3.35e12, 989.4e12, 66.9e12),
}


@dataclass(frozen=True)
class Assumptions:
    """What is not known without a GPU.

    Attributes:
        taps_cached: a convolution's product reads its operands from memory as often as a plain one
            does, each tap of the kernel finds them in a cache; else every tap reads them again, as
            if the matrix of im2col were in memory.
        free_launches: a kernel that only frozen neurons need costs the bytes it moves; else also
            the fixed cost that the package counts for every product.
    """

    taps_cached: bool = True
    free_launches: bool = True


ASSUMPTIONS = {
    "optimistic": Assumptions(),
    "pessimistic": Assumptions(taps_cached=False, free_launches=False),
}


@dataclass(frozen=True)
class Wgrad:
    """Seconds of a weight gradient, and the bytes that are moved only because of frozen neurons."""

    seconds: float
    mask_bytes: float = 0.0


def needed_gemms(work: StepWork, active: Mapping[str, set[int]]) -> Iterator[Gemm]:
    """Every product whose time may be asked for, with so many active neurons of each layer."""
    for layer in work.layers:
        if layer.is_grouped:
            continue
        k = layer.problem.neurons
        yield layer.forward().gemm
        if layer.has_dgrad:
            yield layer.dgrad().gemm
        for n in active[layer.name] | {k}:
            yield layer.wgrad(rounded_up(n, k), 0).gemm
            yield layer.wgrad(n, 0, "TRITON").gemm


class PredictedStep:
    """Times of one step on one GPU.

    Args:
        gpu: the peaks.
        work: of the dense step.
        answers: for all that :func:`needed_gemms` named.
        assumptions: about what the package does not know.
    """

    def __init__(
        self,
        gpu: Gpu,
        work: StepWork,
        answers: Answers,
        assumptions: Assumptions,
    ) -> None:
        self._gpu, self._work, self._answers = gpu, work, answers
        self._assumptions = assumptions
        self._launch = 0.0
        if not assumptions.free_launches:
            self._launch = max(k.latency for kernels in answers.values() for k in kernels)
        self.forward = sum(map(self._forward, work.layers)) + self._moving(work.forward_bytes)
        self.dgrad = sum(map(self._dgrad, work.layers))
        self.wgrads = {layer.name: self._dense_wgrad(layer) for layer in work.layers}
        self.other_backward = self._moving(work.backward_bytes)
        for flops, moved in work.attention:
            self.forward += self._roofline(moved, 2 * flops, gpu.tensor_flops)
            self.other_backward += self._roofline(2 * moved, 5 * flops, gpu.tensor_flops)
        self.optimizer = self._moving(_OPTIMIZER_PASSES * BYTES * work.parameters)

    def seconds(self, wgrads: Mapping[str, float], frozen_parameters: float) -> float:
        """Of a step with these weight gradients, whose optimizer leaves out a share of all."""
        optimizer = self.optimizer * (1 - frozen_parameters)
        rest = self.forward + self.dgrad + self.other_backward + optimizer
        return rest + sum(wgrads.values())

    @property
    def dense(self) -> float:
        return self.seconds(self.wgrads, 0.0)

    def shares(self) -> StepShares:
        """For :func:`neq_kernels.measure.bound`. No backprop stops here, so the layers' dgrad is
        left out."""
        step = self.dense
        layers = tuple(
            LayerShare(
                layer.name,
                self.wgrads[layer.name] / step,
                0.0,
                layer.input_bytes,
                layer.output_bytes,
                layer.weight_bytes,
            )
            for layer in self._work.layers
        )
        backward = self.dgrad + self.other_backward + sum(self.wgrads.values())
        return StepShares(
            seconds=Quantiles(step, step, step),
            forward=self.forward / step,
            backward=backward / step,
            optimizer=self.optimizer / step,
            layers=layers,
            read_bandwidth=self._gpu.bandwidth,
            write_bandwidth=self._gpu.bandwidth,
        )

    def wgrad(self, layer: Layer, n: int, strategy: Strategy) -> Wgrad:
        """The weight gradient of ``n`` active neurons, chosen at random, zeros of the others
        included."""
        k, dense = layer.problem.neurons, self.wgrads[layer.name]
        if n == k:
            return Wgrad(dense)
        row_bytes = layer.weight_bytes / k
        if strategy == Strategy.DENSE:
            zeros = (k - n) * row_bytes
            return Wgrad(dense + self._moving(zeros) + self._launch, zeros)
        read = layer.output_bytes * occupied(layer, n)
        if strategy == Strategy.FUSED:
            return Wgrad(self._fused(layer, n, read), layer.weight_bytes)
        if layer.is_grouped:
            raise ValueError(f"strategy: expected DENSE or FUSED for {layer.name}, got PACK")
        rows = rounded_up(n, k)
        packed = layer.output_bytes * rows / k
        moved = read + packed + n * row_bytes + layer.weight_bytes
        product = self._product(layer.wgrad(rows, packed))
        return Wgrad(product + self._moving(moved) + 2 * self._launch, moved)

    def _fused(self, layer: Layer, n: int, grad_output_bytes: float) -> float:
        """The own kernel, and a second launch that adds the parts of the sum and writes zeros."""
        last = self._moving(layer.weight_bytes) + self._launch
        if not layer.is_grouped:
            return last + self._product(layer.wgrad(n, grad_output_bytes, "TRITON"))
        share = n / layer.problem.neurons
        read = grad_output_bytes + layer.input_bytes * occupied(layer, n)
        return last + self._roofline(read, 2 * layer.macs * share, self._grouped_peak(layer))

    def _forward(self, layer: Layer) -> float:
        if layer.is_grouped:
            return self._grouped(layer, layer.input_bytes + layer.output_bytes)
        return self._product(layer.forward())

    def _dgrad(self, layer: Layer) -> float:
        if not layer.has_dgrad:
            return 0.0
        if layer.is_grouped:
            return self._grouped(layer, layer.input_bytes + layer.output_bytes)
        return self._product(layer.dgrad())

    def _dense_wgrad(self, layer: Layer) -> float:
        if layer.is_grouped:
            return self._grouped(layer, layer.input_bytes + layer.output_bytes)
        return self._product(layer.wgrad(layer.problem.neurons, layer.output_bytes))

    def _grouped(self, layer: Layer, moved: float) -> float:
        flops = 2 * layer.macs
        return self._roofline(moved + layer.weight_bytes, flops, self._grouped_peak(layer))

    def _grouped_peak(self, layer: Layer) -> float:
        depthwise = layer.problem.is_depthwise
        return self._gpu.vector_flops if depthwise else self._gpu.tensor_flops

    def _product(self, product: Product) -> float:
        """The best of the kernels; none reads its operands faster than the memory gives them."""
        read, cached = self._moving(product.operand_bytes), 1.0
        if self._assumptions.taps_cached:
            cached = min(1.0, product.operand_bytes / product.matrix_bytes)
        return min(
            max(kernel.compute, kernel.load * cached, read) + kernel.store + kernel.latency
            for kernel in self._answers[product.gemm]
        )

    def _roofline(self, moved: float, flops: float, peak: float) -> float:
        return max(self._moving(moved), flops / peak)

    def _moving(self, moved: float) -> float:
        return moved / self._gpu.bandwidth


Choice = Callable[[PredictedStep, Layer, int], Strategy]


def own_choice(step: PredictedStep, layer: Layer, n: int) -> Strategy:
    """The library's on a GPU, with Triton kernels."""
    return heuristics.strategy_on_gpu(layer.problem, n, triton.strategies(layer.problem))


def best_choice(step: PredictedStep, layer: Layer, n: int) -> Strategy:
    """The one that is predicted to be fastest."""
    usable = set(triton.strategies(layer.problem))
    if layer.is_grouped:
        usable.discard(Strategy.PACK)
    return min(usable, key=lambda strategy: step.wgrad(layer, n, strategy).seconds)
