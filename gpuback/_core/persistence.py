"""Write named NumPy arrays and metadata to one safetensors file, atomically, and read them. Knows no networks.

Arrays are stored as safetensors stores them, so any safetensors reader can open them. The header's `__metadata__` holds
one string, `gpuback`: JSON with `version` (of this layout), `kind` (what the file is for, such as "model"), `metadata`
(JSON once more, as it was hashed) and `sha256` (over all the rest, so that a changed file is refused rather than
loaded). It is one string because safetensors shuffles several: the same content makes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpuback._core.typing import PathLike
from gpuback.errors import DtypeError, FileFormatError, MissingFolderError, OptionError

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
    dense = {name: np.asarray(array, order="C") for name, array in arrays.items()}
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


def _temporary_prefix(target: str) -> str:
    """Return the prefix of a target's temporary files. It leaves out the target's name, which may be of any length."""
    return f".gpuback-{hashlib.sha256(os.path.basename(target).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}-"


def remove_leftovers(path: PathLike) -> None:
    """Remove the temporary files of `path` that writers left behind when they were killed."""
    target = os.path.realpath(path)
    prefix = _temporary_prefix(target)
    for name in os.listdir(os.path.dirname(target)):
        if name.startswith(prefix) and not _is_running(int(name.removeprefix(prefix).partition("-")[0])):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(os.path.dirname(target), name))


def _is_running(process: int) -> bool:
    if os.name != "posix":  # os.kill would end it there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def require_folder(path: PathLike) -> str:
    """Return the folder of a file at `path`, which has to be writable; a check before long work.

    Raises:
        MissingFolderError: there is no such folder.
        IsADirectoryError: `path` itself is a folder.
        PermissionError: the folder cannot be written to.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise MissingFolderError(f"cannot write {os.fspath(path)}: there is no folder {folder}; make it first")
    if os.path.isdir(os.path.realpath(path)):
        raise IsADirectoryError(f"cannot write {os.fspath(path)}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {os.fspath(path)}: no permission to write to the folder {folder}")
    return folder


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` when the block ends, or vanishes if the block raises.

    The permission bits are those that `open(path, "wb")` would leave; a symbolic link stays and what it points to is
    replaced.

    Raises:
        MissingFolderError: the folder does not exist.
    """
    target = os.path.realpath(path)
    folder = require_folder(path)
    temporary = os.path.join(folder, f"{_temporary_prefix(target)}{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The file is in place. If the folder cannot be synced (Windows, some network mounts), a power cut may bring the old
    # file back. Writing has succeeded all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
