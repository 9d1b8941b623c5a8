"""What is handed to others: the source distribution, wheels, and what make installs. The compiler
here pretends; .ci/run builds and installs the wheel with a real one."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import neq_kernels

ROOT = Path(neq_kernels.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
GENERATED = {"PKG-INFO", "setup.cfg"}
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift || exit 0; done
touch "$2"
"""
TRAINS_ONE_OF_TWO = """
import torch, neq_kernels as neq
layer = neq.convert(torch.nn.Linear(1, 2, bias=False))
layer.channels.set([1])
layer(torch.ones(3, 1)).sum().backward()
print(neq.__file__, layer.weight.grad.tolist())
"""


def files_in(folder):
    """Those of a fresh clone."""
    made = {".so", ".pyc"}
    found = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in made}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources, and what lies among them after work."""
    tree = tmp_path_factory.mktemp("tree")
    for name in {*TOP_FILES, *files_in("neq_kernels"), *files_in("csrc")}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name in (
        "neq_kernels/_C.so",
        "neq_kernels/_cuda.so",
        "neq_kernels/__pycache__/cli.cpython-311.pyc",
        "neq_kernels/notes.txt",
        "csrc/cpu/pack.o",
        "benchmarks/__init__.py",
        "runs/demo/report.html",
        "tests/test_ops.py",
        "dist/neq_kernels-0.0.0.tar.gz",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    return tree


def python(*arguments, cwd, **variables):
    """Standard output and error of Python in an environment that says nothing else of a build."""
    said = ("NEQ_", "CUDA", "CXX", "PYTHONPATH", "MAX_JOBS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(said)}
    environment |= {"NEQ_BUILD_CUDA": "0", "TORCH_DONT_CHECK_COMPILER_ABI": "1"} | variables
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source_distribution(tree, tmp_path_factory):
    """Made as pip and build make it."""
    out = tmp_path_factory.mktemp("out")
    python("-c", f"from setuptools import build_meta as b; b.build_sdist({str(out)!r})", cwd=tree)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture
def compiler(tmp_path):
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return str(path)


def test_a_source_distribution_has_all_sources_and_nothing_else(source_distribution):
    """Whatever the machine that makes it can build."""
    with tarfile.open(source_distribution) as packed:
        files = [each.name for each in packed.getmembers() if each.isfile()]
    names = {name.partition("/")[2] for name in files if ".egg-info/" not in name}
    assert names == {*TOP_FILES, *GENERATED, *files_in("neq_kernels"), *files_in("csrc")}
    assert {".cpp", ".h", ".cu", ".cuh", ".py", ".json"} <= {Path(name).suffix for name in names}


def test_a_source_distribution_is_installed_without_a_compiler(source_distribution, tmp_path):
    (tmp_path / "no_compiler_here").mkdir()
    bare = tmp_path / "bare"
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--target", str(bare))
    command = ("-m", "pip", "install", "-v", *options, str(source_distribution))
    said = python(*command, cwd=tmp_path, PATH=str(tmp_path / "no_compiler_here"))
    assert "no C++ compiler found, so the package is installed without its C++ extension" in said
    assert not list(bare.rglob("*.so"))
    said = python("-c", TRAINS_ONE_OF_TWO, cwd=tmp_path, PYTHONPATH=str(bare))
    assert f"{bare / 'neq_kernels/__init__.py'} [[0.0], [3.0]]" in said
    assert "backend cpu is not used for cpu tensors: the C++ extension was not built" in said


def test_a_wheel_is_of_any_python_and_has_no_cuda_library(tree, compiler, tmp_path):
    command = ("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", ".")
    python(*command, "--wheel-dir", str(tmp_path / "out"), cwd=tree, CXX=compiler)
    (wheel,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(
        rf"neq_kernels-{neq_kernels.__version__}-py3-none-linux_\w+\.whl", wheel.name
    )
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert names == {"neq_kernels/_C.so", *files_in("neq_kernels")}


def test_a_cuda_library_of_before_goes_when_it_is_not_asked_for(tree, compiler):
    (tree / "neq_kernels" / "_cuda.so").touch()
    python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, CXX=compiler)
    assert not (tree / "neq_kernels" / "_cuda.so").exists()
    assert (tree / "neq_kernels" / "_C.so").exists()


def test_make_builds_the_cuda_kernels_when_asked(tmp_path):
    """Then and later; each change of mind installs again."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    pretended = tmp_path / "venv/bin/python"
    pretended.write_text(f'#!/bin/sh\necho "$NEQ_BUILD_CUDA $*" >> {tmp_path}/calls\n')
    pretended.chmod(0o755)

    def built(**asked):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("NEQ_", "MAKE"))}
        command = ["make", "install", f"VENV={tmp_path / 'venv'}"]
        subprocess.run(command, cwd=ROOT, env=environment | asked, check=True, capture_output=True)
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return re.findall(r"^(\w+) -m pip install .* -e ", calls, re.M)

    assert built() == ["0"]
    assert built() == []
    assert built(NEQ_BUILD_CUDA="1") == ["1"]
    assert built(NEQ_BUILD_CUDA="1") == []
    assert built() == ["0"]
    assert built(NEQ_BUILD_CUDA="1") == ["1"]


def test_one_version_of_the_package_and_of_python():
    assert PROJECT["project"]["version"] == neq_kernels.__version__
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == least
    prefix = "Programming Language :: Python :: 3."
    named = [c for c in PROJECT["project"]["classifiers"] if c.startswith(prefix)]
    assert named[0] == f"Programming Language :: Python :: {least}"
    assert f"older than {least};" in (ROOT / "Makefile").read_text()
