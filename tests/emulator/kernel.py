"""A compiled entry point: its parameters, by name, and where in the source its instructions come from."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emulator import structs
from emulator.build import kernel_library, runtime_library
from gpuback._cuda.arguments import TENSOR_MAP_BYTES
from gpuback._cuda.launch import Argument, Slot, TensorMap, Variant


@functools.cache
def load_runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_library()))
    library.emulator_launch.argtypes = [ctypes.c_void_p]
    library.emulator_failure.restype = ctypes.POINTER(structs.Failure)
    library.emulator_conflict_sites.restype = ctypes.c_int64
    library.emulator_conflict_sites.argtypes = [ctypes.POINTER(ctypes.POINTER(structs.ConflictSite))]
    return library


@functools.cache
def load_kernel(variant: Variant, folder: Path, capability: tuple[int, int], checked: bool) -> Kernel:
    """The variant's entry point, compiled if need be."""
    load_runtime()  # first: what the kernel's library refers to
    path = kernel_library(folder / variant.source, variant.defines, capability, checked)
    library = ctypes.CDLL(str(path))
    try:
        entry = structs.Entry.in_dll(library, f"emulator_entry_{variant.entry}")
    except ValueError:
        raise ValueError(f"{variant.source} has no KERNEL {variant.entry}(...)") from None
    parameters = tuple(
        Parameter(name, described.is_pointer, described.is_const, described.kind.decode(), described.size)
        for name, described in zip(entry.parameter_names.decode().split(), entry.parameters, strict=False)
    )
    return Kernel(variant, path, library, entry, parameters)


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter. `kind` and `size` are those of its type, of a pointer those of what it points to."""

    name: str
    is_pointer: bool
    is_const: bool
    kind: str
    size: int

    @property
    def is_tensor_map(self) -> bool:
        return not self.is_pointer and (self.kind, self.size) == ("V", TENSOR_MAP_BYTES)

    @property
    def takes_array(self) -> bool:
        return self.is_pointer or self.is_tensor_map

    def check(self, argument: Argument) -> None:
        """Raises TypeError for an argument that the compiled kernel would misread."""
        if self.is_tensor_map != isinstance(argument, TensorMap) and not (self.is_tensor_map and argument is None):
            expected = "is a TensorMap" if self.is_tensor_map else "is no TensorMap"
            raise TypeError(f"parameter {self.name!r} {expected}, got {argument!r}")
        if self.is_tensor_map:
            return
        given = argument.dtype if isinstance(argument, Slot) else getattr(argument, "dtype", None)
        is_scalar = isinstance(argument, np.generic) or (isinstance(argument, Slot) and given is not None)
        if self.is_pointer:
            if is_scalar:
                raise TypeError(f"parameter {self.name!r} is a pointer, got a scalar {given}")
            if given is not None and not self._may_point_to(np.dtype(given)):
                raise TypeError(f"parameter {self.name!r} points to {self._type}, got an array of {given}")
        elif not is_scalar or (np.dtype(given).kind, np.dtype(given).itemsize) != (self.kind, self.size):
            raise TypeError(f"parameter {self.name!r} is a scalar {self._type}, got {argument!r}")

    def _may_point_to(self, dtype: np.dtype) -> bool:
        if self.kind == "V" or self.size == 1:
            return True
        # 16-bit floats are handed over as their bits, and a flag may be signed or not.
        return dtype.itemsize == self.size and (self.kind == "f") == (dtype.kind == "f" and self.size > 2)

    @property
    def _type(self) -> str:
        return {"f": "float", "i": "int", "u": "uint", "V": "void"}[self.kind] + str(self.size * 8)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A variant, loaded."""

    variant: Variant
    path: Path
    library: Any  # keeps `entry` valid
    entry: structs.Entry
    parameters: tuple[Parameter, ...]

    def lines(self, addresses: Iterable[int]) -> list[str]:
        """The source line, as file:number, that each return address leads back to. Inlined functions of the emulator
        itself are passed over: the line is the kernel's.
        """
        offsets = [f"{address - self.entry.library_begin - 1:#x}" for address in addresses]
        if not offsets:
            return []
        command = ["addr2line", "--exe", str(self.path), "--inlines", "--addresses", *offsets]
        try:
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return ["?" for _ in offsets]
        # For each address a line with the address, then places, the innermost first.
        stacks = [part.splitlines()[1:] for part in re.split(r"^(?=0x)", output, flags=re.MULTILINE) if part]
        return [self._line(stack) for stack in stacks]

    @staticmethod
    def _line(stack: list[str]) -> str:
        places = [place.split(" (discriminator")[0].rpartition(":") for place in stack]
        names = [f"{Path(file).name}:{number}" for file, _, number in places if Path(file).suffix in (".cu", ".cuh")]
        return names[0] if names else "?"
