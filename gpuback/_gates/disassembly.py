"""A cubin's machine code (SASS), by NVIDIA's disassemblers: the wheels' or those on the PATH."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from gpuback._cuda import cache
from gpuback.errors import BackendError

# Products of a warp (HMMA: 16-bit and TF32, DMMA: float64), of a warp group (HGMMA), of Blackwell's tensor memory.
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "DMMA", "UTCHMMA")
# What stands beside HGMMA: copies of boxes to and from shared memory (TMA), and a warp group's change of registers.
_BESIDE_HGMMA = ("UTMALDG", "UTMASTG", "USETMAXREG")
EMPTY_PRODUCT = "empty HGMMA"
"""A product of nothing: ptxas closes a group with it where no product may have come before. A wait counts the group."""
_COUNTED = (*MATRIX_INSTRUCTIONS, *_BESIDE_HGMMA, EMPTY_PRODUCT)
_KERNEL = re.compile(r"^(?:\.text\.(\S+):|\s*Function : (\S+))")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)")
_EMPTY_PRODUCT = re.compile(r"\bHGMMA\S* RZ,")
_COMMANDS = {"nvdisasm": ("--print-code",), "cuobjdump": ("--dump-sass",)}


def matrix_instructions(cubin: Path) -> dict[str, dict[str, int]]:
    """Count the matrix instructions of each kernel of a cubin, and those beside them. Others have an empty count.

    Counts are kept in the cache, by the cubin's content.

    Raises:
        BackendError: there is no disassembler, or it failed.
    """
    content = cubin.read_bytes()
    key = cache.key_of("matrix instructions", _COUNTED, cache.digest(content))
    entry = cache.find(key, ".sass")
    if entry is None:
        counts = count(_disassemble(cubin))
        entry = cache.keep(key, ".sass", json.dumps(counts).encode(), {"counts": counts})
    found: dict[str, dict[str, int]] = entry.record["counts"]
    return found


def count(listing: str) -> dict[str, dict[str, int]]:
    """Count the same in a listing of nvdisasm or of cuobjdump."""
    kernels: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if kernel := _KERNEL.match(line):
            current = kernels.setdefault(kernel[1] or kernel[2], Counter())
        elif (instruction := _INSTRUCTION.match(line)) and instruction[1] in _COUNTED:
            current[EMPTY_PRODUCT if _EMPTY_PRODUCT.search(line) else instruction[1]] += 1
    return {name: dict(counter) for name, counter in kernels.items()}


def sass(cubin: Path, entry: str) -> str:
    """Return the instructions of one kernel of a cubin, as the disassembler prints them.

    Raises:
        BackendError: there is no disassembler, or it failed.
    """
    return section(_disassemble(cubin), entry)


def section(listing: str, entry: str) -> str:
    """Return the lines of one kernel in a listing of nvdisasm or of cuobjdump."""
    lines: list[str] = []
    inside = False
    for line in listing.splitlines():
        if kernel := _KERNEL.match(line):
            inside = (kernel[1] or kernel[2]) == entry
        elif line.startswith("//---"):  # nvdisasm's heading of the next section
            inside = False
        if inside:
            lines.append(line.rstrip())
    return "\n".join(lines)


@functools.cache
def disassembler() -> tuple[str, ...]:
    """Find the command that prints a cubin's instructions.

    Raises:
        BackendError: there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for name, options in _COMMANDS.items():
        found = [str(tool) for place in wheels for tool in sorted(place.glob(f"*/bin/{name}*"))]
        for path in (*found, shutil.which(name)):
            if path:
                return (path, *options)
    raise BackendError(
        "looking at kernels' instructions needs nvdisasm or cuobjdump, and neither is installed: "
        "pip install nvidia-cuda-nvdisasm, or put the CUDA toolkit on the PATH"
    )


def _disassemble(cubin: Path) -> str:
    command = (*disassembler(), str(cubin))
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BackendError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
