"""Builds the C++ extension and the CUDA kernels; everything else about the package is in
pyproject.toml. These environment variables have a say:

NEQ_BUILD_CUDA: auto (default) builds the CUDA kernels where there is an nvcc, 1 insists on them, 0
leaves them out, which is the default of every make target: a wheel of `make dist` has them only if
asked. No GPU and no CUDA build of torch is needed.
NEQ_CUDA_ARCHS: compute capabilities of the GPUs to compile for, "80;90;100" or "8.0 9.0 10.0"; code
of the newest is also kept in a form that the driver compiles for GPUs to come.
CUDACXX: nvcc. Without it: the one of CUDA_HOME or CUDA_PATH, on the PATH, in NVIDIA's Python
packages (nvidia-cuda-nvcc, nvidia-cuda-runtime, ...), or in /usr/local/cuda.
CXX: the C++ compiler. MAX_JOBS: how many compilers run at once.
NEQ_BUILD_SANITIZE=1: build with AddressSanitizer and UndefinedBehaviorSanitizer (for the tests).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

TORCH_2_10 = "0x020a000000000000"
CPU, CUDA = "neq_kernels._C", "neq_kernels._cuda"
KERNELS = Path("csrc/cuda")
OBJECTS = Path("build/cuda")
USUAL_HOME = Path("/usr/local/cuda")
# One of each generation: code for 8.0 also runs on 8.6, 8.7 and 8.9, and so on.
DEFAULT_ARCHS = (75, 80, 90, 100, 120)
LEAST_ARCH = 75
NO_COMPILER = (
    "warning: neq_kernels: no C++ compiler found, so the package is installed without its C++ "
    "extension. Everything works, on the slower `aten` backend. To get the extension, install a "
    "compiler (for example the Debian package g++) and install neq_kernels again."
)
HOW_TO_GET_NVCC = (
    "install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime "
    "nvidia-cuda-cccl nvidia-cuda-crt nvidia-nvvm`, or name an nvcc in CUDACXX"
)


def find_compiler() -> str | None:
    """The C++ compiler that torch's build calls, or None when the machine has none."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    configured = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    return next(filter(shutil.which, [configured, "c++", "g++", "clang++"]), None)


# --- CUDA ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    """What CUDA code is built with: nvcc, the folder of CUDA's headers, its static runtime, and the
    compute capabilities that this nvcc knows (90 is 9.0)."""

    nvcc: str
    include: str
    runtime: str
    archs: tuple[int, ...]


def cuda_wanted() -> str:
    """NEQ_BUILD_CUDA."""
    choice = os.environ.get("NEQ_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"NEQ_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    return choice


def find_toolkit() -> Toolkit | str:
    """The CUDA toolkit, or why there is none."""
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no nvcc found ({HOW_TO_GET_NVCC})"
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.cu")
        empty.touch()
        command = [nvcc, "--dryrun", "-c", str(empty)]
        said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.M)
    if said.returncode != 0 or top is None:
        return f"{nvcc} does not work: {(said.stderr or said.stdout).strip()[:500]}"
    folders = [Path(top[1].strip()).resolve(), *nvidia_packages()]
    headers = _first(folders, ["include", "targets/*/include"], "cuda_runtime.h")
    runtime = _first(folders, ["lib64", "lib", "targets/*/lib"], "libcudart_static.a")
    if headers is None or runtime is None:
        missing = "cuda_runtime.h" if headers is None else "libcudart_static.a"
        return f"{nvcc} has no {missing} beside it (for example of nvidia-cuda-runtime)"
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    archs = sorted({int(number) for number in re.findall(r"\bsm_(\d+)\b", listed.stdout)})
    if not set(archs) & set(DEFAULT_ARCHS):
        return f"{nvcc} is too old (CUDA 11 knows the first GPU that the kernels are made for)"
    return Toolkit(nvcc, str(headers.parent), str(runtime), tuple(archs))


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    if named:
        found = shutil.which(named)
        if found is None:
            raise SystemExit(f"CUDACXX: expected nvcc, got {named!r}, which cannot be executed")
        return found
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home, "bin")) for home in homes] + [os.environ.get("PATH", os.defpath)]
    places += [str(folder / "bin") for folder in nvidia_packages()] + [str(USUAL_HOME / "bin")]
    return next((found for at in places if (found := shutil.which("nvcc", path=at))), None)


def nvidia_packages() -> Iterator[Path]:
    """Where NVIDIA's Python packages put the toolkit's parts, the newest CUDA first; in an isolated
    build those of the environment that is installed into."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in dict.fromkeys(folders):
        found = Path(folder, "nvidia").glob("cu[0-9]*")
        yield from sorted(found, key=lambda path: int(path.name[2:]), reverse=True)


def _first(folders: Sequence[Path], within: Sequence[str], name: str) -> Path | None:
    """The first of these files that there is."""
    for folder in folders:
        for pattern in within:
            for found in sorted(folder.glob(f"{pattern}/{name}")):
                return found
    return None


def find_archs(toolkit: Toolkit) -> list[int]:
    """NEQ_CUDA_ARCHS in ascending order, or of the default ones those that nvcc knows."""
    text = os.environ.get("NEQ_CUDA_ARCHS", "")
    if not text.strip():
        return [arch for arch in DEFAULT_ARCHS if arch in toolkit.archs]
    usable = [arch for arch in toolkit.archs if arch >= LEAST_ARCH]
    archs = parse_archs(text)
    for arch in archs:
        if arch not in usable:
            expected = f"some of {';'.join(map(str, usable))} for {toolkit.nvcc}"
            raise SystemExit(f"NEQ_CUDA_ARCHS: expected {expected}, got {arch}")
    return archs


def parse_archs(text: str) -> list[int]:
    """Of "80;90", "8.0, 9.0" and the like; ascending."""
    archs = set()
    for word in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        if not re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", word):
            raise SystemExit(
                f"NEQ_CUDA_ARCHS: expected compute capabilities such as 80;90;100, got {text!r}"
            )
        archs.add(int(word.replace(".", "")))
    return sorted(archs)


def nvcc_command(toolkit: Toolkit, archs: Sequence[int]) -> list[str]:
    """Without the names of files. Nothing of a library is visible but what its loader needs."""
    command = [toolkit.nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if os.environ.get("CXX"):
        command.append(f"-ccbin={os.environ['CXX'].split()[-1]}")  # without a ccache before it
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*command, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def kernel_sources(folder: Path = KERNELS) -> list[Path]:
    """All ``.cu`` files, the largest first: they take longest. Objects are named by their stems."""
    sources = sorted(folder.rglob("*.cu"), key=lambda path: (-path.stat().st_size, path))
    of_stem: dict[str, Path] = {}
    for path in sources:
        other = of_stem.setdefault(path.stem, path)
        if other != path:
            raise SystemExit(
                f"{folder}: expected .cu files of different names, got {other}, {path}"
            )
    return sources


def compile_kernels(toolkit: Toolkit, archs: Sequence[int]) -> list[str]:
    """The objects of all kernels; those that are newer than the sources are kept."""
    headers = [*KERNELS.rglob("*.cuh"), *KERNELS.rglob("*.h")]
    jobs = max(1, int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))))
    threads = f"--threads={min(jobs, len(archs) + 1)}"
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = OBJECTS / f"{source.stem}.o"
        made_by = target.with_suffix(".command")
        command = [*nvcc_command(toolkit, archs), "-c", str(source), "-o", str(target)]
        newest = max(path.stat().st_mtime for path in [source, *headers])
        made = made_by.read_text() if made_by.exists() and target.exists() else None
        if made != "\n".join(command) or target.stat().st_mtime < newest:
            print(" ".join(command), flush=True)
            made_by.unlink(missing_ok=True)
            done = subprocess.run([*command, threads], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                why = "\n".join((done.stdout + done.stderr).splitlines()[:40])
                raise SystemExit(
                    f"{why}\nneq_kernels: nvcc cannot compile {source}; NEQ_BUILD_CUDA=0 builds "
                    "the package without its CUDA kernels"
                )
            print(done.stderr, end="", file=sys.stderr)
            made_by.write_text("\n".join(command))
        return str(target)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, kernel_sources()))


def cuda_extension(toolkit: Toolkit, **common: Any) -> Extension:
    """Its kernels are compiled when it is built. It is linked with torch alone: of CUDA's own
    libraries only the driver's is needed, and that only when a kernel is launched."""
    link_args = [toolkit.runtime, "-ldl", "-lrt", "-lpthread"]
    link_args += ["-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    # Beside it libtorch_cuda is found where torch has one, and it loads where torch has none.
    link_args += ["-Wl,--no-as-needed", "-ltorch"]
    common["include_dirs"] = [*common["include_dirs"], toolkit.include]
    return Extension(
        CUDA,
        [str(path) for path in sorted(KERNELS.rglob("*.cpp"))],
        depends=sorted(str(path) for path in KERNELS.rglob("*.[ch]*") if path.suffix != ".cpp"),
        extra_link_args=link_args,
        **common,
    )


# --- both ----------------------------------------------------------------------------------------


class BuildPyWithoutCompiler(build_py):
    def run(self) -> None:
        print(NO_COMPILER, file=sys.stderr)
        super().run()


class WheelOfAnyPython(bdist_wheel):
    """The libraries use torch's stable ABI and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def with_extensions(wanted: str) -> dict[str, object]:
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    compile_args = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"]
    compile_args += ["-Wno-unused-parameter", "-Wno-psabi", "-fopenmp-simd", "-g0"]
    common = {
        "include_dirs": include_paths(),
        "library_dirs": library_paths(),
        "libraries": ["torch_cpu"],
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_2_10)],
        "language": "c++",
    }
    sanitize = []
    if os.environ.get("NEQ_BUILD_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined"]
        sanitize_args = ["-O1", "-g", "-fno-sanitize-recover=undefined", *sanitize]
    extensions = [
        Extension(
            CPU,
            sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc/cpu").rglob("*.h")),
            extra_compile_args=compile_args + (sanitize_args if sanitize else []),
            extra_link_args=sanitize,
            **common,
        )
    ]
    toolkit = "NEQ_BUILD_CUDA=0" if wanted == "0" else find_toolkit()
    archs: list[int] = []
    if isinstance(toolkit, Toolkit):
        archs = find_archs(toolkit)
        extensions.append(cuda_extension(toolkit, extra_compile_args=compile_args, **common))
    elif wanted == "1":
        raise SystemExit(f"NEQ_BUILD_CUDA=1: {toolkit}")

    class BuildBoth(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
        def build_extensions(self) -> None:
            if isinstance(toolkit, Toolkit):
                cuda = next(each for each in self.extensions if each.name == CUDA)
                cuda.extra_objects = compile_kernels(toolkit, archs)
                cuda.depends += cuda.extra_objects
            else:
                print(f"neq_kernels: built without CUDA kernels: {toolkit}", file=sys.stderr)
            super().build_extensions()

        def run(self) -> None:
            super().run()
            if not isinstance(toolkit, Toolkit):
                # What an earlier build has left would be installed, or loaded, with the rest.
                Path(self.get_ext_fullpath(CUDA)).unlink(missing_ok=True)

    commands = {"build_ext": BuildBoth, "bdist_wheel": WheelOfAnyPython}
    return {"ext_modules": extensions, "cmdclass": commands}


def main() -> None:
    wanted = cuda_wanted()
    if find_compiler() is not None:
        setup(**with_extensions(wanted))
    elif wanted == "1":
        raise SystemExit("NEQ_BUILD_CUDA=1: the CUDA kernels need a C++ compiler")
    else:
        setup(cmdclass={"build_py": BuildPyWithoutCompiler})


if __name__ == "__main__":
    main()
