"""Compile kernel sources to cubins with NVRTC, behind a cache. Needs CuPy's binding of NVRTC, but no GPU.

Kernels become machine code for one architecture, never PTX, which the driver would compile once more.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from gpuback._cuda import cache
from gpuback._cuda.coefficients import COEFFICIENTS
from gpuback._cuda.cubin import complete, parameter_sizes
from gpuback._cuda.launch import Variant
from gpuback._cuda.sources import flatten
from gpuback._text import shown
from gpuback.errors import BackendError

# IEEE arithmetic is NVRTC's default; it is written out because results depend on it.
OPTIONS = (
    "-std=c++17",
    "-default-device",  # a constexpr function without a mark is the device's: there is no host code
    "-ftz=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-fmad=true",
    "--ptxas-options=-v",
)
# From this version on, on machines with a driver, NVRTC has a cache of its own. Its hits come without the ptxas log.
_CACHES_SINCE = (12, 9)
_RECORD_VERSION = 3
_MOST_LINES = 100  # of a log that an error shows
# ptxas reports with these codes, as mere information, what it has undone of a kernel for Hopper: the overlap of wgmma
# instructions, or setmaxnreg.
UNDONE = re.compile(r"\bC75\d\d\b|Potential Performance Loss", re.IGNORECASE)
_WARNING = re.compile(r"\bwarning\s*[:#]", re.IGNORECASE)


class Resources(NamedTuple):
    """The resources of one thread or block of a kernel, as ptxas reports them.

    Attributes:
        registers: of a thread.
        stack_bytes: local memory of a thread, functions that it calls included.
        spill_store_bytes, spill_load_bytes: registers written to and read from local memory for want of registers.
        shared_bytes: static shared memory of a block.
        barriers: hardware barriers of a block.
        parameter_sizes: bytes of each parameter; None where the cubin does not say.
    """

    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    barriers: int = 0
    parameter_sizes: tuple[int, ...] | None = None


_FIELDS = Resources._fields[:-1]  # what the log tells


class Compiled(NamedTuple):
    """A compiled variant.

    Attributes:
        path: the cubin, with all the kernels of the variant's file.
        resources: of the variant's kernel.
        warnings: lines of the compiler's log that warn, of all kernels of the file.
    """

    path: Path
    resources: Resources
    warnings: tuple[str, ...]


def compile_variant(variant: Variant, arch: str, *, folder: Path | None = None) -> Compiled:
    """Compile a variant to a cubin, or take it out of the cache.

    Args:
        variant: what to compile.
        arch: an architecture as NVRTC names it, such as "sm_90a".
        folder: where the sources lie; gpuback's kernels by default.

    Raises:
        BackendError: NVRTC is missing, does not know the architecture, or refuses the source (its log is in the
            message); or the source has no such kernel.
    """
    source = flatten(variant.source, folder)
    nvrtc, version = load_nvrtc()
    own_cache = ("--no-cache",) if version >= _CACHES_SINCE else ()
    options = (f"-arch={arch}", *OPTIONS, *own_cache, *(f"-D{define}" for define in variant.defines))
    key = cache.key_of(_RECORD_VERSION, source, options, version)
    entry = cache.find(key, ".cubin")
    if entry is None:
        cubin, log = _compile(nvrtc, version, variant, source, arch, options)
        entry = cache.keep(key, ".cubin", cubin, _record(variant, arch, version, cubin, log))
    kernels: dict[str, dict[str, Any]] = entry.record["kernels"]
    if variant.entry not in kernels:
        raise BackendError(
            f'{variant.source}: expected an extern "C" kernel named {variant.entry!r}, '
            f"found {', '.join(kernels) or 'none'}"
        )
    fields = kernels[variant.entry]
    sizes = fields["parameter_sizes"]
    resources = Resources(**fields | {"parameter_sizes": None if sizes is None else tuple(sizes)})
    return Compiled(entry.path, resources, tuple(entry.record["warnings"]))


def _record(variant: Variant, arch: str, version: tuple[int, int], cubin: bytes, log: str) -> dict[str, Any]:
    sizes = parameter_sizes(cubin)
    kernels = {
        name: resources._replace(parameter_sizes=sizes.get(name))._asdict()
        for name, resources in parse_log(log).items()
    }
    warnings = [line.strip() for line in log.splitlines() if _WARNING.search(line) or UNDONE.search(line)]
    return {
        "source": variant.source,
        "defines": variant.defines,
        "arch": arch,
        "nvrtc": version,
        "kernels": kernels,
        "warnings": warnings,
    }


def parse_log(log: str) -> dict[str, Resources]:
    """Read what `--ptxas-options=-v` says of each kernel, for CUDA 12 and 13.

    ptxas reports a function that was not inlined separately, and does not name its callers. Its spills count for every
    kernel of the file.
    """
    kernels: dict[str, dict[str, int]] = {}
    functions: dict[str, dict[str, int]] = {}
    compiled = described = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            compiled = described = match[1]
            kernels[compiled] = {}
        elif match := re.search(r"Function properties for (\S+)", line):
            described = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            names = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
            told = dict(zip(names, map(int, match.groups()), strict=True))
            (kernels if described in kernels else functions).setdefault(described, {}).update(told)
        elif match := re.search(r"Used (\d+) registers", line):
            fields = kernels.setdefault(compiled, {})
            fields["registers"] = int(match[1])
            fields["barriers"] = _number(r"used (\d+) barriers", line)
            fields["shared_bytes"] = _number(r"(\d+)(?:\+\d+)? bytes smem", line)
            fields["stack_bytes"] = max(
                fields.get("stack_bytes", 0), _number(r"(\d+) bytes cumulative stack size", line)
            )
    for function in functions.values():
        for fields in kernels.values():
            for name in ("spill_store_bytes", "spill_load_bytes"):
                fields[name] = fields.get(name, 0) + function[name]
            fields["stack_bytes"] = max(fields.get("stack_bytes", 0), function["stack_bytes"])
    return {
        name: Resources._make((*(fields.get(field, 0) for field in _FIELDS), None)) for name, fields in kernels.items()
    }


def _number(pattern: str, line: str) -> int:
    match = re.search(pattern, line)
    return int(match[1]) if match else 0


def load_nvrtc() -> tuple[ModuleType, tuple[int, int]]:
    """Return CuPy's binding of NVRTC, and NVRTC's version.

    Raises:
        BackendError: one of them is missing.
    """
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise BackendError(
            f"compiling kernels needs CuPy, which cannot be imported ({error}); "
            "pip install '.[cuda12]' or '.[cuda13]' in gpuback's source tree"
        ) from error
    try:
        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"compiling kernels needs NVRTC, which CuPy cannot load ({error}); install the CUDA toolkit of CuPy's "
            "major version or, from CuPy 14 on, its wheel: pip install nvidia-cuda-nvrtc "
            "(nvidia-cuda-nvrtc-cu12 for CUDA 12)"
        ) from error
    return nvrtc, (int(major), int(minor))


def _compile(
    nvrtc: ModuleType, version: tuple[int, int], variant: Variant, source: str, arch: str, options: tuple[str, ...]
) -> tuple[bytes, str]:
    require_known(nvrtc, version, arch)
    program = nvrtc.createProgram(source, variant.source, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = _log(nvrtc, program)
            needs = re.search(r"requires \.target (sm_\w+)", log)
            remedy = (
                f"the kernel needs {needs[1]} or later: choose dtype='float32' without allow_tf32, or backend='numpy'"
                if needs
                else "please report this, with the log"
            )
            problem = BackendError(
                f"NVRTC {version[0]}.{version[1]} did not compile {title(variant)} for {arch} ({error}); {remedy}"
            )
            for line in log.splitlines()[:_MOST_LINES]:
                problem.add_note(shown(line))
            raise problem from error
        return complete(nvrtc.getCUBIN(program)), _log(nvrtc, program)
    finally:
        nvrtc.destroyProgram(program)


def _log(nvrtc: ModuleType, program: Any) -> str:
    log: str = nvrtc.getProgramLog(program)
    return log.replace("\0", "").strip()


def title(variant: Variant) -> str:
    """Name a variant in messages: its file, its kernel and its choices."""
    return " ".join((variant.source, variant.entry, *choices(variant)))


def choices(variant: Variant) -> tuple[str, ...]:
    """List the macros that tell variants of a kernel apart. Coefficients are the same in all of them, and long."""
    return tuple(define for define in variant.defines if define not in COEFFICIENTS)


def require_known(nvrtc: ModuleType, version: tuple[int, int], arch: str) -> None:
    """Raise BackendError unless that NVRTC compiles for that architecture."""
    known = [int(number) for number in nvrtc.getSupportedArchs()]
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if match and int(match[1]) in known:
        return
    newer = match is None or int(match[1]) > max(known)
    remedy = (
        "pip install --upgrade CuPy and nvidia-cuda-nvrtc, or the CUDA toolkit"
        if newer
        else "install CuPy and NVRTC of an earlier CUDA, which still know it"
    )
    raise BackendError(
        f"NVRTC {version[0]}.{version[1]} cannot compile for {arch}: it knows "
        f"{', '.join(f'sm_{number}' for number in known)}; {remedy}"
    )
