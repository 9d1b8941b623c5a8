"""What takes the place of tensor cores before sm_80."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda_on_cpu.emulator import MODES, Run, build
from tests.support.cuda_cases import FOLDER

SOURCE = Path(__file__).with_name("before_sm_80.cu")


@pytest.mark.parametrize("mode", MODES[::2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lanes_multiply_as_tensor_cores_do(dtype, mode):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 2 * n, generator=generator).to(dtype).view(torch.int32) for n in (4, 2))
    plain, emulated = torch.full((2, 32, 4), torch.nan)
    library = build([SOURCE], include=[FOLDER])
    run = Run(library, mode, {"a": a, "b": b}, {"plain": plain, "emulated": emulated})
    run.call("products", int(dtype == torch.float16), a, b, plain, emulated)
    torch.testing.assert_close(plain, emulated, rtol=1e-5, atol=1e-5)
