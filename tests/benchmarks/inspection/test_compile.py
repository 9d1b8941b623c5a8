"""What is in a cubin that Triton did not make."""

import subprocess
from pathlib import Path

import pytest
import triton

from benchmarks.inspection import compile
from benchmarks.inspection.compile import inspect_cubin

# Two kernels: one with 2048 bytes of shared memory, one with a loop around one product.
SOURCE = """
.version 8.0
.target sm_80
.address_size 64

.visible .entry turns(.param .u64 to)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 tile[2048];
    mov.u32 %r1, %tid.x;
    mov.u64 %rd1, tile;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd1, %rd1, %rd2;
    st.shared.u32 [%rd1], %r1;
    bar.sync 0;
    xor.b64 %rd1, %rd1, 4;
    ld.shared.u32 %r2, [%rd1];
    ld.param.u64 %rd3, [to];
    add.s64 %rd3, %rd3, %rd2;
    st.global.u32 [%rd3], %r2;
    ret;
}

.visible .entry multiplies(.param .u64 to, .param .u32 times)
{
    .reg .pred %p;
    .reg .b32 %r<8>;
    .reg .f32 %f<5>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [to];
    ld.param.u32 %r7, [times];
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    ld.global.v2.b32 {%r5, %r6}, [%rd1 + 16];
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1 + 32];
AGAIN:
    .pragma "nounroll";
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
    sub.u32 %r7, %r7, 1;
    setp.ne.u32 %p, %r7, 0;
    @%p bra AGAIN;
    st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};
    ret;
}
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def cubin(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")
    source, out = folder / "two.ptx", folder / "two.cubin"
    source.write_text(SOURCE)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    subprocess.run([ptxas, f"--gpu-name={request.param}", source, "-o", out], check=True)
    return out.read_bytes()


def test_each_kernel_of_a_cubin_is_told_apart(cubin):
    turns = inspect_cubin(cubin, warps=4, kernel="turns")
    multiplies = inspect_cubin(cubin, warps=8, kernel="multiplies")
    assert (turns.warps, turns.shared, turns.tensor_core, turns.loop) == (4, 2048, 0, 0)
    assert (multiplies.warps, multiplies.shared, multiplies.tensor_core) == (8, 0, 1)
    assert 1 < multiplies.loop < 12
    for each in (turns, multiplies):
        assert 0 < each.registers < 40
        assert each.spills == each.asynchronous == 0


def test_shared_memory_of_the_launch_is_added(cubin):
    assert inspect_cubin(cubin, 4, 1024, "turns").shared == 3072
    assert inspect_cubin(cubin, 4, 1024, "multiplies").shared == 1024


def test_a_kernel_is_named_where_there_are_several(cubin):
    with pytest.raises(ValueError, match=r"expected one kernel, got .*(turns|multiplies)"):
        inspect_cubin(cubin, 4)
    with pytest.raises(ValueError, match="expected kernel turn, got"):
        inspect_cubin(cubin, 4, kernel="turn")


LISTING = """
.L_x_0:
        /*0000*/ MOV R1, R2 ;
        /*0010*/ @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/ HGMMA R8, R8 ;
        /*0030*/ @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0040*/ IADD3 R1, R1 ;
        /*0050*/ BRA.U UP0, `(.L_x_1) ;
.L_x_3:
        /*0060*/ HGMMA R9, R9 ;
        /*0070*/ STG R1 ;
        /*0080*/ EXIT ;
.L_x_4:
        /*0090*/ SYNCS R1 ;
        /*00a0*/ @!P0 BRA `(.L_x_4) ;
        /*00b0*/ BRA `(.L_x_2) ;
.L_x_5:
        /*00c0*/ BRA `(.L_x_5);
"""


def test_a_loop_is_what_is_executed_again_wherever_it_stands():
    """Waiting stands behind the end of the kernel: between the two lies what is no part of it."""
    lines = [line for line in LISTING.splitlines() if line.strip()]
    assert compile._innermost(lines, compile._NVIDIA_JUMP) == (7, 1)


def test_loops_of_amd_assembly():
    text = """
.LBB0_1:
        v_mfma_f32 v0
        s_cbranch_scc1 .LBB0_3
        s_add s0
        s_branch .LBB0_1
.LBB0_3:
        v_mfma_f32 v1
        s_endpgm
"""
    lines = [line for line in text.splitlines() if line.strip()]
    assert compile._innermost(lines, compile._AMD_JUMP) == (4, 1)
