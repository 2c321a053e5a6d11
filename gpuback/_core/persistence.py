"""Write named NumPy arrays and metadata to one safetensors file, atomically, and read them. Knows no networks.

Arrays are stored as safetensors stores them, so any safetensors reader can open them. The header's `__metadata__` holds
one string, `gpuback`: JSON with `version` (of this layout), `kind` (what the file is for, such as "model"), `metadata`
(JSON once more, as it was hashed) and `sha256` (over all the rest, so that a changed file is refused rather than
loaded). It is one string because safetensors shuffles several: the same content makes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from gpuback._core.output_files import replacing
from gpuback._core.typing import PathLike
from gpuback.errors import DtypeError, FileFormatError, OptionError

FORMAT_VERSION = 1
_DTYPES = {
    **{"BOOL": np.dtype(bool), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")},
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "C64": np.dtype("<c8")},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
}
_HEADER_KEYS = ("version", "kind", "metadata", "sha256")


class Storable(Protocol):
    """What can be kept in a file beside a network."""

    def as_fields(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays by name, and metadata that JSON can hold."""


def write(path: PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], *, kind: str) -> None:
    """Write arrays and metadata to one file. Afterwards `path` holds all of it or, on failure, what it held before.

    Args:
        path: the file to make or replace; its folder must exist.
        arrays: name → array of any shape and memory layout, with a dtype that safetensors knows (floats of 8 to 64
            bits, bfloat16, integers, bool).
        metadata: what `json.dumps` accepts; it comes back as JSON has it (tuples as lists, keys as strings).
        kind: what the file is for; `read` refuses a file of another kind.

    Raises:
        MissingFolderError: the folder does not exist.
        DtypeError: a dtype or a metadata value cannot be stored.
        OptionError: an array's name cannot be used.
        OSError: the file system refused, as `open` would say.
    """
    if "__metadata__" in arrays:
        raise OptionError("expected array names that safetensors allows, got '__metadata__', which it reserves")
    try:
        metadata_json = json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise DtypeError(f"{os.fspath(path)}: expected metadata that JSON can hold: {error}") from error
    # safetensors copies raw memory from the array's address on: strides would be ignored without a word.
    # (np.ascontiguousarray would turn 0-d arrays into 1-d ones.)
    # The copy is hashed and then stored, whatever another thread does to the arrays meanwhile.
    dense = {name: np.array(array, order="C") for name, array in arrays.items()}
    for name, array in dense.items():
        if array.dtype.hasobject:
            raise DtypeError(f"{os.fspath(path)}: expected numbers, got Python objects in array {name!r}")
    digest = _digest(dense, metadata_json, kind)
    header = dict(zip(_HEADER_KEYS, (FORMAT_VERSION, kind, metadata_json, digest), strict=True))
    try:
        content = save(dense, {"gpuback": json.dumps(header)})
    except SafetensorError as error:
        raise DtypeError(f"{os.fspath(path)}: expected arrays that safetensors can hold: {error}") from error
    except UnicodeEncodeError as error:
        raise OptionError(f"{os.fspath(path)}: expected names that UTF-8 can hold: {error}") from error
    with replacing(path) as file:
        file.write(content)


def read(path: PathLike, *, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file that `write` made.

    Args:
        path: the file.
        kind: the kind it was written as.

    Returns:
        (arrays, metadata). The arrays are fresh, writable and C-contiguous.

    Raises as `read_any`.
    """
    return read_any(path, kinds=(kind,))[1:]


def read_any(path: PathLike, *, kinds: Sequence[str]) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """Read a file that `write` made as one of these kinds.

    Args:
        path: the file.
        kinds: the kinds it may have; messages call it by the first.

    Returns:
        (its kind, arrays, metadata). The arrays are fresh, writable and C-contiguous.

    Raises:
        FileFormatError: the file is cut short, not safetensors, of another program, kind or format version, or changed.
            The hash finds damage, not forgery: anybody can compute it. Callers check what they take from the file.
        FileNotFoundError: there is no such file.
    """
    path = os.fspath(path)
    if stat.S_ISFIFO(mode := os.stat(path).st_mode) or stat.S_ISCHR(mode):
        raise FileFormatError(f"{path}: expected a safetensors file, found a pipe or device")
    # Read, not mapped: whoever truncates a mapped file ends the process that reads it.
    with open(path, "rb") as file:
        content = file.read()
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise FileFormatError(f"{path}: {_damage(content)} ({error})") from error
    kind, metadata_json, expected = _checked_header(path, _strings(content), kinds)
    del content
    arrays = {name: _array(path, name, tensor) for name, tensor in tensors}
    digest = _digest(arrays, metadata_json, kind)
    if digest != expected:
        raise FileFormatError(
            f"{path}: expected content with SHA-256 {expected}, found {digest}: the file was changed or damaged after"
            " it was written"
        )
    try:
        metadata = json.loads(metadata_json)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: expected metadata in JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: expected metadata by name, found {type(metadata).__name__}")
    return kind, arrays, metadata


def _strings(content: bytes) -> dict[str, str]:
    """Return what a sound safetensors file has in `__metadata__`."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__") or {}


def _array(path: str, name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    """Make an array of its own memory of what safetensors found; its bytes have the length that shape and dtype say."""
    if tensor["dtype"] not in _DTYPES:
        raise FileFormatError(
            f"{path}, array {name!r}: expected a dtype of {', '.join(_DTYPES)}, found {tensor['dtype']}"
        )
    try:
        array = np.empty(tensor["shape"], _DTYPES[tensor["dtype"]])
    except (ValueError, OverflowError) as error:  # an axis of length 0 beside absurd ones, or too many axes
        raise FileFormatError(
            f"{path}, array {name!r}: expected the shape of an array, found {tensor['shape']}: {error}"
        ) from error
    array.reshape(-1).view(np.uint8)[...] = np.frombuffer(tensor["data"], np.uint8)
    return array if array.dtype.isnative else array.byteswap().view(array.dtype.newbyteorder("="))


def _digest(arrays: Mapping[str, np.ndarray], metadata_json: str, kind: str) -> str:
    """SHA-256 over everything that `read` hands out, in an order that does not depend on the file's."""
    sha = hashlib.sha256()
    sha.update(json.dumps([FORMAT_VERSION, kind, metadata_json]).encode())
    for name in sorted(arrays):
        array = arrays[name].astype(arrays[name].dtype.newbyteorder("<"), copy=False)
        # A list in JSON has one reading, and dtype and shape say how many bytes follow: no two contents hash alike.
        sha.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _checked_header(path: str, header: Mapping[str, str], kinds: Sequence[str]) -> tuple[str, str, str]:
    """(kind, metadata as JSON, SHA-256) of a file of this version and one of these kinds."""
    if "gpuback" not in header:
        raise FileFormatError(f"{path}: expected a gpuback {kinds[0]}, found a safetensors file of another program")
    try:
        version, found_kind, metadata_json, digest = (json.loads(header["gpuback"])[key] for key in _HEADER_KEYS)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FileFormatError(
            f"{path}: expected {', '.join(_HEADER_KEYS)} in gpuback's header, found {header['gpuback'][:80]!r}"
        ) from error
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{path}: expected format version {FORMAT_VERSION}, found {version!r}: a newer gpuback may read it"
        )
    if found_kind not in kinds:
        raise FileFormatError(f"{path}: expected a gpuback {kinds[0]}, found a gpuback {found_kind}")
    if not (isinstance(metadata_json, str) and isinstance(digest, str)):
        raise FileFormatError(f"{path}: expected metadata and sha256 as texts in gpuback's header")
    return found_kind, metadata_json, digest


def _damage(content: bytes) -> str:
    """Say what is wrong with a file that safetensors refused, in the reader's terms: bytes expected, bytes found."""
    size = len(content)
    if size < 9:
        return f"expected a safetensors file, found {size} bytes, too few for its header"
    if content[8:9] != b"{":
        return f"expected a safetensors file, which has '{{' at byte 8, found {content[8:9]!r}"
    header_end = 8 + int.from_bytes(content[:8], "little")
    if header_end > size:
        return f"expected a header that ends at byte {header_end}, found the file's end at byte {size}"
    try:
        header = json.loads(content[8:header_end])
        header.pop("__metadata__", None)
        end = header_end + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "expected a safetensors header, found one that is malformed"
    if end != size:
        return f"expected {end} bytes, found {size}"
    return "expected a safetensors file, found one that contradicts itself"
