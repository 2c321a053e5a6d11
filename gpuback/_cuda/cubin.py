"""Read a cubin, an ELF file for a GPU: its length, and the parameters of its kernels."""

from __future__ import annotations

import struct
from typing import NamedTuple

from gpuback.errors import BackendError

_NO_BITS = 8
_INFO_PREFIX = ".nv.info."
_FORMAT_WITH_SIZE = 4  # EIFMT_SVAL: two bytes of size follow, then the value
_PARAMETER_INFO = 0x17  # EIATTR_KPARAM_INFO


class _Section(NamedTuple):
    name: str
    kind: int
    offset: int
    size: int


def complete(cubin: bytes) -> bytes:
    """Restore the cubin's last byte, always 0, which CuPy's `nvrtc.getCUBIN` drops as a string terminator.

    A cubin ends with a table of headers, whose last field (an alignment or a size, 8 bytes, lowest first) has a zero
    there.

    Raises:
        BackendError: this is no cubin, or more of it is missing.
    """
    end, table_end = _ends(cubin)
    if len(cubin) >= end:
        return cubin
    if len(cubin) == end - 1 and table_end == end:
        return cubin + b"\0"
    raise BackendError(f"NVRTC's cubin: expected {end} bytes, got {len(cubin)}; another version of CuPy may help")


def parameter_sizes(cubin: bytes) -> dict[str, tuple[int, ...]]:
    """Count the bytes of each kernel's parameters, in order; leave out kernels without parameters or a record."""
    kernels: dict[str, tuple[int, ...]] = {}
    for section in _sections(cubin):
        if section.name.startswith(_INFO_PREFIX):
            sizes = _parameters(cubin[section.offset : section.offset + section.size])
            if sizes:
                kernels[section.name.removeprefix(_INFO_PREFIX)] = tuple(sizes[ordinal] for ordinal in sorted(sizes))
    return kernels


def _parameters(info: bytes) -> dict[int, int]:
    """Ordinal → bytes. Each record: format, attribute, then a value or, in its place, the size of what follows."""
    sizes: dict[int, int] = {}
    position = 0
    while position + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, position)
        position += 4
        if form == _FORMAT_WITH_SIZE:
            if attribute == _PARAMETER_INFO:
                _, ordinal, _, packed = struct.unpack_from("<IHHI", info, position)
                sizes[ordinal] = packed >> 18
            position += value
    return sizes


def _header(cubin: bytes) -> tuple[int, int, int, int, int, int, int]:
    if len(cubin) < 64 or cubin[:6] != b"\x7fELF\x02\x01":
        raise BackendError(
            f"NVRTC's cubin: expected a 64-bit ELF file, got {len(cubin)} bytes that begin {cubin[:6]!r}"
        )
    programs, sections = struct.unpack_from("<QQ", cubin, 32)
    return (programs, sections, *struct.unpack_from("<HHHHH", cubin, 54))


def _ends(cubin: bytes) -> tuple[int, int]:
    """(where the file ends, where the last of its two tables of headers ends)."""
    programs, sections, program_size, n_programs, section_size, n_sections, _ = _header(cubin)
    table_end = max(programs + program_size * n_programs, sections + section_size * n_sections)
    if sections + section_size * n_sections > len(cubin) + 1:
        return table_end, table_end
    content = (section.offset + section.size for section in _sections(cubin) if section.kind != _NO_BITS)
    return max(table_end, *content, 0), table_end


def _sections(cubin: bytes) -> list[_Section]:
    _, start, _, _, size, count, names = _header(cubin)
    padded = cubin + b"\0"  # the section headers may stand last
    raw = [struct.unpack_from("<IIQQQQ", padded, start + index * size) for index in range(count)]
    text = padded[raw[names][4] :] if count else b""
    return [
        _Section(text[name : text.index(b"\0", name)].decode(), kind, offset, length)
        for name, kind, _, _, offset, length in raw
    ]
