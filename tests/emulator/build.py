"""Compiles the emulator's runtime and kernel variants with g++, once each: libraries are kept on disk."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

EMULATOR = Path(__file__).parent
KERNELS = EMULATOR.parents[1] / "kernels"

# Without contraction a * b + c rounds twice, as NVRTC does it with -fmad=false. Kernels read the same bytes as numbers
# of one type and of another, and 16 at a time, which C++ forbids and CUDA lives on.
_LANGUAGE = (
    *("-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fPIC", "-Wno-unknown-pragmas"),
    "-fstack-clash-protection",  # a large frame cannot jump over the inaccessible page below the stack
    "-fno-gnu-unique",  # libraries of one kernel's variants must not share what templates hold
)
_RUNTIME = (*_LANGUAGE, "-O3", "-g1", "-fvisibility=hidden", "-Wall", "-Wextra")
# A function that ends with a call returns to its own caller, not to that one's: messages name the right line.
_NAMED_LINES = ("-g1", "-fno-optimize-sibling-calls")
_KERNEL = (*_LANGUAGE, *_NAMED_LINES, "-O2")
# Every load and store calls the checker. Nothing may merge or split them (a float4 that is taken apart into scalars
# would be four reads), lest what is counted is not what the source says.
_CHECKED_KERNEL = (
    *(*_LANGUAGE, *_NAMED_LINES, "-O1", "-fno-tree-vectorize", "-fno-store-merging", "-fno-tree-sra"),
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
)
# As KERNEL in emulated_ptx.h and __cluster_dims__ in cuda_language.h leave it after preprocessing.
_ENTRY = re.compile(
    r'extern "C" __attribute__\(\(noinline\)\) void\s+(?:\[\[emulator::cluster\(([^()]*)\)\]\]\s*)?'
    r"(\w+)\s*\(([^()]*)\)\s*\{"
)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def compiler_missing() -> str | None:
    """Why kernels cannot be compiled here, or None if they can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"the emulator runs on x86-64 Linux only, this is {platform.machine()} {platform.system()}"
    if shutil.which("g++") is None:
        return "the emulator needs g++, which is not installed"
    return None


class CompileError(Exception):
    """g++ refused a kernel; the message is what it said."""


@functools.cache
def runtime_library() -> Path:
    """The shared library with the runtime and the checker."""
    sources = sorted(EMULATOR.glob("*.cpp"))
    key = _hash(_compiler_version(), _RUNTIME, _machine_flags(), *sorted([*sources, *EMULATOR.glob("*.h")]))
    library = cache_folder() / f"libgpuback_emulator-{key}.so"

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            objects = [f"{folder}/{source.stem}.o" for source in sources]
            flags = (*_RUNTIME, *_machine_flags())
            compilers = [
                _start("g++", *flags, "-c", str(source), "-o", object_file)
                for source, object_file in zip(sources, objects, strict=True)
            ]
            for compiler in compilers:
                _finish(compiler)
            soname = f"-Wl,-soname,{library.name}"
            _finish(_start("g++", "-shared", soname, *objects, "-o", str(target)))

    _build_once(library, build)
    return library


def kernel_library(source: Path, defines: Sequence[str], capability: tuple[int, int], checked: bool) -> Path:
    """The shared library with all entry points of a kernel's source."""
    runtime = runtime_library()
    flags = _flags(defines, capability, checked)
    # The runtime's name stands for all of the emulator's own headers and for the compiler.
    key = _hash(runtime.name, flags, *included_files(source, (KERNELS, EMULATOR)))
    library = cache_folder() / f"{source.stem}-{key}.so"

    def build(target: Path) -> None:
        text = _preprocess(source, flags)
        for name, (parameters, cluster) in _entry_points(text).items():
            names = " ".join(parameters)
            exported = f'extern "C" __attribute__((visibility("default"))) const emulator::Entry emulator_entry_{name}'
            text += f'{exported} = emulator::make_entry<&{name}>("{names}", {cluster});\n'
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            object_file = f"{temporary}/kernel.o"
            _finish(_start("g++", *flags, "-c", "-x", "c++-cpp-output", "-", "-o", object_file, stdin=True), text)
            # A second step, since linking with -fsanitize=thread would bring g++'s own thread sanitizer. The runtime is
            # found at load time as the library's neighbour.
            link = ("-shared", "-Wl,-rpath,$ORIGIN", f"-L{runtime.parent}", f"-l:{runtime.name}")
            _finish(_start("g++", object_file, *link, "-o", str(target)))

    _build_once(library, build)
    return library


def entry_points(source: Path, defines: Sequence[str], capability: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """The names of each entry point's parameters, as g++ preprocesses a kernel's source."""
    text = _preprocess(source, _flags(defines, capability, checked=False))
    return {name: parameters for name, (parameters, _) in _entry_points(text).items()}


def _flags(defines: Sequence[str], capability: tuple[int, int], checked: bool) -> tuple[str, ...]:
    return (
        *(_CHECKED_KERNEL if checked else _KERNEL),
        *_machine_flags(),
        "-DGPUBACK_EMULATOR",
        f"-D__CUDA_ARCH__={capability[0] * 100 + capability[1] * 10}",
        *(f"-D{define}" for define in defines),
        f"-I{EMULATOR}",
        f"-I{KERNELS}",
    )


def _preprocess(source: Path, flags: Sequence[str]) -> str:
    return _finish(_start("g++", *flags, "-E", "-include", "entry.h", "-x", "c++", str(source), "-o", "-"))


def _entry_points(preprocessed: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Each entry point's parameters, and the number of blocks in its clusters."""
    found = _ENTRY.findall(re.sub(r"^#.*", "", preprocessed, flags=re.MULTILINE))
    return {name: (_names(parameters), cluster or "1") for cluster, name, parameters in found}


def _names(parameters: str) -> tuple[str, ...]:
    """The last word of each declaration."""
    return tuple(re.findall(r"\w+", parameter)[-1] for parameter in parameters.split(",") if parameter.strip())


def included_files(source: Path, folders: Sequence[Path]) -> list[Path]:
    """A source and all that it includes by name in quotes, each once."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            candidates = (folder / name for folder in (path.parent, *folders))
            # One that is nowhere may stand under an #if that leaves it out; if not, g++ will say so.
            waiting += [file.resolve() for file in candidates if file.is_file()][:1]
    return list(found)


@functools.cache
def cache_folder() -> Path:
    """Where libraries are kept: a folder that nobody else may write to, since what lies there is executed."""
    chosen = os.environ.get("GPUBACK_EMULATOR_CACHE")
    folder = Path(chosen or Path(tempfile.gettempdir()) / f"gpuback-emulator-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if not chosen and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written to by others; set GPUBACK_EMULATOR_CACHE to a private folder")
    return folder.resolve()


def _build_once(library: Path, build: Callable[[Path], None]) -> None:
    """Makes the library unless it is there. Of several processes that need it at once, one builds."""
    if library.exists():
        return
    with _locked(library.with_suffix(".lock")):
        if library.exists():
            return
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        try:
            build(unfinished)
            os.replace(unfinished, library)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(*command: str, stdin: bool = False) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe if stdin else subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _finish(process: subprocess.Popen, text: str | None = None) -> str:
    output, log = process.communicate(text)
    if process.returncode:
        raise CompileError(f"{' '.join(process.args)}\n{log}")
    return output


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """Wide vectors and fma in hardware where this machine has them: faster, and the same numbers."""
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return ("-march=x86-64-v3",) if {"avx2", "bmi2", "fma", "f16c", "movbe", "abm"} <= words else ()


def _hash(*parts: object) -> str:
    """Of texts, and of files by their content."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:20]
