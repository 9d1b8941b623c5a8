"""Builds the C++ extension; everything else about the package is in pyproject.toml.

NEQ_BUILD_CUDA: auto (default) or 0 build no CUDA code, 1 is refused by this version.
NEQ_BUILD_SANITIZE=1: build with AddressSanitizer and UndefinedBehaviorSanitizer (for the tests).
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

TORCH_2_10 = "0x020a000000000000"
NO_COMPILER = (
    "warning: neq_kernels: no C++ compiler found, so the package is installed without its C++ "
    "extension. Everything works, on the slower `aten` backend. To get the extension, install a "
    "compiler (for example the Debian package g++) and install neq_kernels again."
)


def find_compiler() -> str | None:
    """The C++ compiler that torch's build calls, or None when the machine has none."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    configured = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    return next(filter(shutil.which, [configured, "c++", "g++", "clang++"]), None)


def refuse_cuda() -> None:
    choice = os.environ.get("NEQ_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"NEQ_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "1":
        raise SystemExit(
            "NEQ_BUILD_CUDA=1: the CUDA kernels are not part of this version; use auto or 0"
        )


class BuildPyWithoutCompiler(build_py):
    def run(self) -> None:
        print(NO_COMPILER, file=sys.stderr)
        super().run()


def with_extension() -> dict[str, object]:
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    compile_args = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"]
    compile_args += ["-Wno-unused-parameter", "-Wno-psabi", "-fopenmp-simd", "-g0"]
    link_args = []
    if os.environ.get("NEQ_BUILD_SANITIZE") == "1":
        link_args = ["-fsanitize=address,undefined"]
        compile_args += ["-O1", "-g", "-fno-sanitize-recover=undefined", *link_args]
    extension = Extension(
        "neq_kernels._C",
        sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_10)],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        language="c++",
    )
    build_ext = BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_ext}}


refuse_cuda()
if find_compiler() is None:
    setup(cmdclass={"build_py": BuildPyWithoutCompiler})
else:
    setup(**with_extension())
