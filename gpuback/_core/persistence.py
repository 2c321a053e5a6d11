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
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpuback._core.output_files import replacing
from gpuback._core.typing import PathLike
from gpuback.errors import DtypeError, FileFormatError, OptionError

FORMAT_VERSION = 1
_HEADER_KEYS = ("version", "kind", "metadata", "sha256")


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

    Raises:
        FileFormatError: the file is cut short, not safetensors, of another program, kind or format version, or changed.
        FileNotFoundError: there is no such file.
    """
    path = os.fspath(path)
    with open(path, "rb"):
        pass  # Python names what it cannot open (missing, a folder, no permission) better than safetensors does.
    try:
        with safe_open(path, framework="np") as file:
            metadata_json, expected = _checked_header(path, file.metadata() or {}, kind)
            # Not every version of safetensors hands out arrays that own their memory.
            names = file.keys()
            arrays = {name: np.require(file.get_tensor(name), requirements=["C", "W", "O"]) for name in names}
    except SafetensorError as error:
        raise FileFormatError(f"{path}: {_damage(path)} ({error})") from error
    digest = _digest(arrays, metadata_json, kind)
    if digest != expected:
        raise FileFormatError(
            f"{path}: expected content with SHA-256 {expected}, found {digest}: the file was changed or damaged after"
            " it was written"
        )
    return arrays, json.loads(metadata_json)


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


def _checked_header(path: str, header: Mapping[str, str], kind: str) -> tuple[str, str]:
    """(metadata as JSON, SHA-256) of a file of this kind and version."""
    if "gpuback" not in header:
        raise FileFormatError(f"{path}: expected a gpuback {kind}, found a safetensors file of another program")
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
    if found_kind != kind:
        raise FileFormatError(f"{path}: expected a gpuback {kind}, found a gpuback {found_kind}")
    return metadata_json, digest


def _damage(path: str) -> str:
    """Say what is wrong with a file that safetensors refused, in the reader's terms: bytes expected, bytes found."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        if size < 9:
            return f"expected a safetensors file, found {size} bytes, too few for its header"
        if start[8:] != b"{":
            return f"expected a safetensors file, which has '{{' at byte 8, found {start[8:]!r}"
        header_end = 8 + int.from_bytes(start[:8], "little")
        if header_end > size:
            return f"expected a header that ends at byte {header_end}, found the file's end at byte {size}"
        try:
            header = json.loads(b"{" + file.read(header_end - 9))
            header.pop("__metadata__", None)
            end = header_end + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, TypeError, LookupError, RecursionError):
            return "expected a safetensors header, found one that is malformed"
    if end != size:
        return f"expected {end} bytes, found {size}"
    return "expected a safetensors file, found one that contradicts itself"
