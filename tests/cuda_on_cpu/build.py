"""Compiles CUDA C++ sources, with the emulator's runtime, to a library for the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
SUFFIXES = {".cu", ".cuh", ".cpp", ".h", ".hpp"}
COMPILER = os.environ.get("CXX", "g++")
COMMON = ["-O2", "-g1", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing", "-Wno-psabi"]
# What the compiler would otherwise move without the hook that reports it.
HOOKED = ("memcpy", "memmove", "memset")
CHECKED_RUNTIME = ("check.cpp", "hooks.cpp", "races.cpp", "traffic.cpp")

Replacement = tuple[str | Path, str, str]


def build(
    sources: Sequence[str | Path],
    *,
    include: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    replace: Iterable[Replacement] = (),
    checked: bool = True,
    portable: bool = False,
    std: str = "c++17",
    flags: Sequence[str] = (),
    links: Sequence[str] = (),
) -> Library:
    """The library made of these sources, from the cache when nothing has changed.

    Args:
        sources: ``.cu`` and ``.cpp`` files. What Python calls in them is ``extern "C"``, takes
            pointers, integers, ``float`` and ``double``, and returns ``cudaError_t``.
        include: folders for ``#include``, after the emulator's own.
        defines: preprocessor macros.
        replace: ``(file, old, new)``: texts to be replaced in copies of the sources and of the
            headers that they include. ``file`` is a path or the end of one.
        checked: every access of kernel code is checked and counted. False: as fast as it gets.
        portable: switch threads by ``ucontext`` and convert 16-bit floats by integer arithmetic, as
            on CPUs other than x86-64.

        flags: more for the compiler, as where to find headers that are not the project's.
        links: more for the linker.

    Raises:
        ValueError: a text to be replaced does not occur exactly once.
        RuntimeError: the compiler refuses the sources; the message is the compiler's.
    """
    files = [Path(source).resolve() for source in sources]
    folders = list(
        dict.fromkeys([*(f.parent for f in files), *(Path(i).resolve() for i in include)])
    )
    texts = _with_headers(files, folders)
    replaced = _with_replacements(texts, replace)
    options = [f"-std={std}", *(f"-D{name}={value}" for name, value in (defines or {}).items())]
    options += flags
    variant = ["-march=native"] * (not portable) + ["-DNEQ_EMU_PORTABLE"] * portable
    variant += ["-DNEQ_EMU_CHECKED"] * checked
    runtime = {
        p: p.read_text() for p in _sources_in(HERE) if p.parent.name in ("runtime", "include")
    }
    key = _key({**runtime, **replaced}, files, folders, options, variant, links)
    target = _cache() / f"{key}.so"
    with _locked(target):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
                made = _Build(Path(scratch), variant, checked)
                made.kernels(files, folders, replaced if replaced != texts else None, options)
                os.replace(made.link(links), target)
    return Library(target, checked)


class Library:
    """A compiled library. ``locate`` finds the places in its sources."""

    def __init__(self, path: Path, checked: bool) -> None:
        self.path = path
        self.checked = checked
        self.functions = ctypes.CDLL(str(path))
        self.functions.neq_emu_result.restype = ctypes.c_char_p
        self.functions.neq_emu_error_name.restype = ctypes.c_char_p
        self.run: object = None  # the one that is under way
        self._known: dict[int, list[tuple[str, str, int]]] = {}

    def function_name(self, offset: int) -> str:
        """The function that begins at this offset in the library."""
        return self._frames([offset])[0][-1][0]

    def locate(self, return_addresses: Sequence[int]) -> list[tuple[str, int]]:
        """File and line of calls: the innermost place that is not the emulator's own."""
        places = []
        for frames in self._frames([max(0, address - 1) for address in return_addresses]):
            outside = [f for f in frames if INCLUDE not in Path(f[1]).parents] or frames
            places.append((outside[0][1], outside[0][2]))
        return places

    def _frames(self, offsets: Sequence[int]) -> list[list[tuple[str, str, int]]]:
        """For every offset function, file and line, from the innermost inlined call outwards."""
        unknown = sorted(set(offsets) - self._known.keys())
        if unknown:
            command = ["addr2line", "-e", str(self.path), "-a", "-f", "-i", "-C"]
            rest = iter(_run([*command, *map(hex, unknown)]).splitlines())
            for line in rest:
                if line.startswith("0x"):
                    frames = self._known[int(line, 16)] = []
                    continue
                file, _, number = next(rest).partition(" (")[0].rpartition(":")
                frames.append((line, file, int(number) if number.isdigit() else 0))
        return [self._known[offset] for offset in offsets]


class _Build:
    """One library in the making, in a folder of its own."""

    def __init__(self, folder: Path, variant: list[str], checked: bool) -> None:
        self.folder, self.variant, self.checked = folder, variant, checked
        self.objects = [_runtime(variant, checked)]

    def kernels(
        self,
        files: Sequence[Path],
        folders: Sequence[Path],
        copies: dict[Path, str] | None,
        options: Sequence[str],
    ) -> None:
        """Compiles the sources; with ``copies`` those texts instead, under the files' names."""
        root = self.folder / "copies"
        prefix = ""
        if copies is not None:
            prefix = str(root)
            options = [*options, f"-ffile-prefix-map={root}="]
            for path, text in copies.items():
                copy = Path(f"{prefix}{path}")
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text)
        for number, file in enumerate(files):
            target = self.folder / f"{number}.o"
            command = [COMPILER, *COMMON, *options, *self.variant, f"-I{INCLUDE}"]
            command += [f"-I{prefix}{folder}" for folder in folders]
            command += ["-fsanitize=thread"] * self.checked
            _run([*command, "-x", "c++", "-c", f"{prefix}{file}", "-o", str(target)])
            if self.checked:
                renamed = [f"--redefine-sym={name}=neq_emu_{name}" for name in HOOKED]
                _run(["objcopy", *renamed, str(target)])
            self.objects.append(target)

    def link(self, links: Sequence[str]) -> Path:
        target = self.folder / "library.so"
        command = [COMPILER, "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *map(str, self.objects)]
        _run([*command, "-o", str(target), *links, "-ldl"])
        return target


def _runtime(variant: Sequence[str], checked: bool) -> Path:
    """The emulator's own part, compiled as one: that takes half the time."""
    texts = {p: p.read_text() for name in ("runtime", "include") for p in _sources_in(HERE / name)}
    target = _cache() / f"{_key(texts, variant)}.o"
    with _locked(target):
        if not target.exists():
            names = [path for path in texts if path.suffix == ".cpp"]
            names = [path for path in names if checked or path.name not in CHECKED_RUNTIME]
            source = target.with_suffix(".cpp")
            source.write_text("".join(f'#include "{path}"\n' for path in names))
            made = target.with_suffix(".new")
            command = [COMPILER, *COMMON, "-g0", "-std=c++20", "-fvisibility=hidden", *variant]
            _run([*command, f"-I{INCLUDE}", "-c", str(source), "-o", str(made)])
            os.replace(made, target)
    return target


def _with_replacements(
    texts: Mapping[Path, str], replacements: Iterable[Replacement]
) -> dict[Path, str]:
    replaced = dict(texts)
    for file, old, new in replacements:
        parts = Path(file).parts
        found = [path for path in replaced if path.parts[-len(parts) :] == parts]
        if len(found) != 1:
            raise ValueError(f"replace: expected one file {file}, got {found}")
        count = replaced[found[0]].count(old)
        if count != 1:
            raise ValueError(f"replace: expected {old!r} once in {file}, got it {count} times")
        replaced[found[0]] = replaced[found[0]].replace(old, new)
    return replaced


def _with_headers(files: Sequence[Path], folders: Sequence[Path]) -> dict[Path, str]:
    """The texts of the files and of what they include, the emulator's and the system's excepted."""
    texts: dict[Path, str] = {}
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path in texts:
            continue
        texts[path] = path.read_text()
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', texts[path], re.MULTILINE):
            found = [
                folder / name for folder in (path.parent, *folders) if (folder / name).is_file()
            ]
            waiting += [found[0].resolve()] if found else []
    return texts


def _sources_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES)


def _key(texts: Mapping[Path, str], *parts: Sequence[object]) -> str:
    own = Path(__file__).read_text()
    described = (own, sorted((str(p), t) for p, t in texts.items()), _machine(), *map(list, parts))
    return hashlib.sha256(repr(described).encode()).hexdigest()[:32]


@functools.cache
def _machine() -> tuple[str, ...]:
    """What ``-march=native`` and the compiler's version depend on."""
    info = Path("/proc/cpuinfo")
    flags = [
        line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))
    ]
    return (platform.machine(), *sorted(set(flags)), _run([COMPILER, "--version"]))


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"neq_cuda_on_cpu_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time makes the target; the others find it."""
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is needed to emulate CUDA, and is not on the PATH")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
