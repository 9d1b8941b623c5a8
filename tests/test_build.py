"""What setup.py builds, and with which tools. The compilers here are scripts that pretend."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VARIABLES = ("NEQ_BUILD_CUDA", "NEQ_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")
NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  --list-gpu-code) printf 'sm_50\\nsm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_100\\nsm_103\\n' ;;
  *)
    echo "$@" >> {home}/calls
    grep -q broken {home}/calls && echo "error: broken" >&2 && exit 1
    while [ "$1" != -o ]; do shift; done
    touch "$2" ;;
esac
"""


@pytest.fixture
def setup_py(monkeypatch):
    spec = importlib.util.spec_from_file_location("neq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "neq_setup", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(setup_py, monkeypatch):
    """setup.py in an environment that says nothing and has no nvcc."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setattr(setup_py, "nvidia_packages", lambda: iter([]))
    monkeypatch.setattr(setup_py, "USUAL_HOME", Path("/nowhere"))
    return setup_py


def toolkit_in(home, *, headers=True, runtime=True):
    """A CUDA toolkit; its nvcc."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(home=home))
    nvcc.chmod(0o755)
    for wanted, name in ((headers, "include/cuda_runtime.h"), (runtime, "lib/libcudart_static.a")):
        if wanted:
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).touch()
    return str(nvcc)


def refusal(function, *arguments):
    with pytest.raises(SystemExit) as refused:
        function(*arguments)
    return str(refused.value)


# --- whether -------------------------------------------------------------------------------------


def test_cuda_is_built_where_it_can_be(build, monkeypatch):
    assert build.cuda_wanted() == "auto"
    for choice in ("auto", "0", "1"):
        monkeypatch.setenv("NEQ_BUILD_CUDA", choice)
        assert build.cuda_wanted() == choice


def test_other_wishes_are_refused(build, monkeypatch):
    monkeypatch.setenv("NEQ_BUILD_CUDA", "yes")
    assert refusal(build.cuda_wanted) == "NEQ_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"


def names_of(found):
    return [extension.name for extension in found["ext_modules"]]


def test_without_nvcc_only_the_cpu_extension_is_built(build, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert names_of(build.with_extensions("auto")) == [build.CPU]


def test_who_insists_is_told_how_to_get_nvcc(build, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refusal(build.with_extensions, "1")
    assert message.startswith("NEQ_BUILD_CUDA=1: no nvcc found (install the CUDA toolkit, or `pip")


def test_with_nvcc_both_are_built(build, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDACXX", toolkit_in(tmp_path))
    assert names_of(build.with_extensions("0")) == [build.CPU]
    cpu, cuda = build.with_extensions("auto")["ext_modules"]
    assert not [name for name in cpu.sources if "cuda" in name]
    assert all(name.startswith("csrc/cuda/") for name in cuda.sources + cuda.depends)
    assert "csrc/cuda/launchers.h" in cuda.depends
    assert cuda.libraries == ["torch_cpu"]
    assert str(tmp_path / "lib/libcudart_static.a") in cuda.extra_link_args
    assert str(tmp_path / "include") in cuda.include_dirs
    assert str(tmp_path / "include") not in cpu.include_dirs


# --- with which tools ----------------------------------------------------------------------------


def test_where_nvcc_is_looked_for(build, monkeypatch, tmp_path):
    """From the last place to the first; each has the say over those before it."""
    assert build.find_nvcc() is None
    nvcc = {n: toolkit_in(tmp_path / n) for n in ("usual", "package", "path", "p", "home", "named")}
    monkeypatch.setattr(build, "USUAL_HOME", tmp_path / "usual")
    assert build.find_nvcc() == nvcc["usual"]
    monkeypatch.setattr(build, "nvidia_packages", lambda: iter([tmp_path / "package"]))
    assert build.find_nvcc() == nvcc["package"]
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"), prepend=os.pathsep)
    assert build.find_nvcc() == nvcc["path"]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "p"))
    assert build.find_nvcc() == nvcc["p"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == nvcc["home"]
    monkeypatch.setenv("CUDACXX", nvcc["named"])
    assert build.find_nvcc() == nvcc["named"]


def test_a_home_without_nvcc_is_passed_over(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(Path(toolkit_in(tmp_path / "other")).parent))
    assert build.find_nvcc() == str(tmp_path / "other/bin/nvcc")


def test_a_named_nvcc_must_be_there(build, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert "CUDACXX: expected nvcc, got '/nowhere/nvcc'" in refusal(build.find_nvcc)


def test_python_packages_of_the_newest_cuda_come_first(setup_py, monkeypatch, tmp_path):
    for name in ("cu9", "cu13", "cu12", "cudnn"):
        (tmp_path / "nvidia" / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [path for path in setup_py.nvidia_packages() if tmp_path in path.parents]
    assert [path.name for path in found] == ["cu13", "cu12", "cu9"]


def test_what_a_toolkit_has(build, monkeypatch, tmp_path):
    nvcc = toolkit_in(tmp_path)
    monkeypatch.setenv("CUDACXX", nvcc)
    headers, runtime = str(tmp_path / "include"), str(tmp_path / "lib/libcudart_static.a")
    archs = (50, 75, 80, 86, 90, 100, 103)
    assert build.find_toolkit() == build.Toolkit(nvcc, headers, runtime, archs)


@pytest.mark.parametrize("missing", ["headers", "runtime"])
def test_a_toolkit_without_a_part_is_none(build, monkeypatch, tmp_path, missing):
    nvcc = toolkit_in(tmp_path / "half", **{missing: False})
    monkeypatch.setenv("CUDACXX", nvcc)
    names = {"headers": "cuda_runtime.h", "runtime": "libcudart_static.a"}
    assert build.find_toolkit().startswith(f"{nvcc} has no {names[missing]} beside it")
    # The part may come from a Python package.
    toolkit_in(tmp_path / "packages")
    monkeypatch.setattr(build, "nvidia_packages", lambda: iter([tmp_path / "packages"]))
    assert build.find_toolkit().nvcc == nvcc


def test_an_nvcc_that_does_not_work_is_none(build, monkeypatch, tmp_path):
    nvcc = toolkit_in(tmp_path)
    Path(nvcc).write_text("#!/bin/sh\necho no license >&2\nexit 1\n")
    monkeypatch.setenv("CUDACXX", nvcc)
    assert build.find_toolkit() == f"{nvcc} does not work: no license"


def test_an_old_nvcc_is_none(build, monkeypatch, tmp_path):
    nvcc = Path(toolkit_in(tmp_path))
    script = nvcc.read_text()
    for known, older in (("75", "70"), ("80", "71"), ("90", "72"), ("100", "73")):
        script = script.replace(f"sm_{known}", f"sm_{older}")
    nvcc.write_text(script)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert build.find_toolkit().startswith(f"{nvcc} is too old (CUDA 11 ")


# --- for which GPUs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80", [80]),
        ("75;80;90;100", [75, 80, 90, 100]),
        ("100, 80", [80, 100]),
        ("8.0 9.0 12.0", [80, 90, 120]),
        ("8.6;86;", [86]),
    ],
)
def test_archs(build, text, archs):
    assert build.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["sm_80", "80;native", "8", "9.0a", "8000", "80+PTX", "-80", ";"])
def test_bad_archs(build, text):
    message = f"NEQ_CUDA_ARCHS: expected compute capabilities such as 80;90;100, got {text!r}"
    assert refusal(build.parse_archs, text) == message


def test_archs_are_those_that_nvcc_knows(build, monkeypatch):
    toolkit = build.Toolkit("nvcc", "", "", (50, 75, 80, 86, 90, 100, 103))
    assert build.find_archs(toolkit) == [75, 80, 90, 100]
    monkeypatch.setenv("NEQ_CUDA_ARCHS", " ")
    assert build.find_archs(toolkit) == [75, 80, 90, 100]
    monkeypatch.setenv("NEQ_CUDA_ARCHS", "8.6;103")
    assert build.find_archs(toolkit) == [86, 103]
    for arch in ("50", "120"):
        monkeypatch.setenv("NEQ_CUDA_ARCHS", f"80;{arch}")
        expected = f"expected some of 75;80;86;90;100;103 for nvcc, got {arch}"
        assert refusal(build.find_archs, toolkit) == f"NEQ_CUDA_ARCHS: {expected}"


def test_gpus_to_come_get_code_of_the_newest(build, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    command = build.nvcc_command(build.Toolkit("nvcc", "", "", ()), [80, 90])
    assert command[-3:] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("CXX", "ccache clang++")
    assert "-ccbin=clang++" in build.nvcc_command(build.Toolkit("nvcc", "", "", ()), [80])


# --- the kernels ---------------------------------------------------------------------------------


@pytest.fixture
def kernels(build, monkeypatch, tmp_path):
    """Compiles two of them; what nvcc has been called with since."""
    monkeypatch.chdir(tmp_path)
    (build.KERNELS / "wgrad").mkdir(parents=True)
    for name in ("a.cu", "wgrad/b.cu", "wgrad/shared.cuh", "launchers.h", "bindings.cpp"):
        (build.KERNELS / name).touch()
    toolkit = build.Toolkit(toolkit_in(tmp_path / "home"), "", "", ())
    calls = tmp_path / "home" / "calls"

    def compile(*archs):
        calls.unlink(missing_ok=True)
        objects = build.compile_kernels(toolkit, archs)
        assert [Path(each).name for each in objects] == ["a.o", "b.o"]
        return calls.read_text().splitlines() if calls.exists() else []

    return compile


def change(path):
    for each in [*Path("csrc").rglob("*"), *Path("build").rglob("*")]:
        os.utime(each, (1e9, 1e9))
    os.utime(path, (2e9, 2e9))


def test_objects_are_kept_as_long_as_nothing_changes(kernels, monkeypatch):
    assert len(kernels(80)) == 2
    monkeypatch.setenv("MAX_JOBS", "7")
    assert kernels(80) == []
    change("csrc/cuda/bindings.cpp")
    assert kernels(80) == []
    change("csrc/cuda/wgrad/b.cu")
    (call,) = kernels(80)
    assert "-c csrc/cuda/wgrad/b.cu -o build/cuda/b.o" in call
    for header in ("wgrad/shared.cuh", "launchers.h"):
        change(f"csrc/cuda/{header}")
        assert len(kernels(80)) == 2
    change("csrc/cuda/bindings.cpp")
    assert len(kernels(80, 90)) == 2
    Path("build/cuda/a.o").unlink()
    assert len(kernels(80, 90)) == 1


def test_a_kernel_that_does_not_compile_ends_the_build(build, kernels, monkeypatch):
    (build.KERNELS / "wgrad" / "b.cu").rename(build.KERNELS / "broken.cu")
    message = refusal(kernels, 80)
    assert message.startswith("error: broken\n")
    assert "nvcc cannot compile csrc/cuda/" in message
    assert "NEQ_BUILD_CUDA=0 builds the package without" in message


def test_two_kernels_of_one_name_are_refused(build, kernels):
    """The object of one would be taken for the other's."""
    (build.KERNELS / "a" / "b.cu").parent.mkdir()
    (build.KERNELS / "a" / "b.cu").touch()
    message = refusal(kernels, 80)
    assert message.startswith("csrc/cuda: expected .cu files of different names, got csrc/cuda/a/b")
    assert message.endswith("csrc/cuda/wgrad/b.cu")


# --- what comes of it ----------------------------------------------------------------------------


LIBRARY = ROOT / "neq_kernels" / "_cuda.so"


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels are not built")
def test_the_library_needs_no_cuda_and_shows_nothing():
    command = ["readelf", "--dynamic", "--wide", str(LIBRARY)]
    dynamic = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if "cuda" in name or "nv" in name]
    command = ["nm", "-D", "--defined-only", str(LIBRARY)]
    visible = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "neq" not in visible
    assert "cuda" not in visible
