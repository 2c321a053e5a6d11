"""Compiled kernels on disk: found again by a key, checked before they are used, safe to share between processes.

An entry is two files: its content (KEY.cubin, a plain file that CUDA loads by path) and KEY.json, which says how long
the content is, seals both with SHA-256, and carries a record of whatever the writer wants to know later. An entry that
is cut short, changed, or another's counts as absent, and is written anew.

The folder is `GPUBACK_CACHE_DIR` where that is set; else gpuback/kernels in the platform's folder for caches:
$XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows. Where it cannot be written,
a temporary folder serves until the process ends. It may be deleted at any time.

An entry is machine code, and the seal can be computed by anybody. So nobody but the user and root may have been able to
write to it: entries and all folders above have to be theirs, and writable for nobody else, as ssh wants it of its keys.
A folder with the sticky bit, such as /tmp, may have one of the user's own in it. `GPUBACK_CACHE_DIR` is refused
otherwise; in place of the platform's folder the temporary one serves.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpuback._core.output_files import replacing
from gpuback._core.places import follow
from gpuback._text import shown
from gpuback.errors import BackendError

ENVIRONMENT = "GPUBACK_CACHE_DIR"
_ROOT = 0
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Entry(NamedTuple):
    """A kept file and its record.

    Attributes:
        path: the file with the content.
        record: what was kept with it.
    """

    path: Path
    record: dict[str, Any]


def key_of(*parts: object) -> str:
    """Make the key of an entry from these parts (anything that JSON has): equal for equal parts only."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest(content: bytes) -> str:
    """Return a hash of bytes, as a part of a key."""
    return hashlib.sha256(content).hexdigest()


def folder() -> Path:
    """Return the folder of the entries, if it can be written.

    Raises:
        OSError: nothing says where a cache may lie.
    """
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen).expanduser().absolute()
    return _platform_folder() / "gpuback" / "kernels"


def find(key: str, suffix: str) -> Entry | None:
    """Return the entry of that key, if there is one, it is sound, and nobody else can have written it.

    Raises:
        BackendError: others can write to the folder that `GPUBACK_CACHE_DIR` names.
    """
    try:
        entry = _read(_safe(folder()), key, suffix)
        if entry is not None:
            return entry
    except OSError as error:
        _refuse_chosen(error)
    return _read(_temporary_folder(), key, suffix) if _temporary_folder.cache_info().currsize else None


def keep(key: str, suffix: str, content: bytes, record: Mapping[str, Any]) -> Entry:
    """Write an entry, or take the one that another process has just written.

    Raises:
        BackendError: there is no place to write to, or others can write to the folder that `GPUBACK_CACHE_DIR` names.
    """
    try:
        place = folder()
        _make(place)
        return _write(_safe(place), key, suffix, content, record)
    except OSError as error:
        _refuse_chosen(error)
        # Windows does not replace a file that another process has open. The entry is there already then.
        entry = find(key, suffix)
        if entry is not None:
            return entry
        _warn_once(str(error))
    try:
        return _write(_temporary_folder(), key, suffix, content, record)
    except OSError as error:
        raise BackendError(
            f"compiled kernels cannot be written to a temporary folder either: {error}; "
            f"set {ENVIRONMENT} to a folder that can be written"
        ) from error


def read_file(name: str) -> bytes:
    """Return the content of a file of another kind in the folder, if nobody else can have written it.

    Raises:
        OSError: there is none, or it is not the user's alone.
    """
    return _content(_safe(folder()) / name)


def write_file(name: str, content: bytes) -> None:
    """Write a file of another kind into the folder, whole or not at all.

    Raises:
        OSError: it cannot be written, or others can write to the folder.
    """
    place = folder()
    _make(place)
    with replacing(_safe(place) / name, anew=True) as file:
        file.write(content)


class _UnsafeError(PermissionError):
    """Others can put files there. The GPU would run them."""


def _refuse_chosen(error: OSError) -> None:
    if isinstance(error, _UnsafeError) and os.environ.get(ENVIRONMENT):
        raise BackendError(
            f"{ENVIRONMENT}={os.environ[ENVIRONMENT]}: {error}, and what is in the folder runs on the GPU. Remedy: "
            f"chmod go-w and chown the folder, or set {ENVIRONMENT} to one that is yours alone"
        ) from error


@functools.cache
def _warn_once(reason: str) -> None:
    message = (
        f"compiled kernels cannot be kept, so every process compiles them anew ({reason}); "
        f"set {ENVIRONMENT} to a folder that can be written"
    )
    warnings.warn(shown(message), RuntimeWarning, stacklevel=4)


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if os.path.isabs(chosen) else _home() / ".cache"  # the standard says to ignore relative paths


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise FileNotFoundError(f"no home folder: {error}") from error


def _safe(place: Path, *, to_write: bool = True) -> Path:
    """Return the place without links, once all of the way there is known to be the user's and root's alone.

    Args:
        place: a folder; what of it does not exist is safe.
        to_write: files go there, so that the sticky bit of the folder itself is not enough.

    Raises:
        _UnsafeError: naming the folder that is not.
    """
    if os.name != "posix":
        return place

    def require_safe(path: str, status: os.stat_result) -> None:
        if status.st_uid not in _trusted():
            raise _UnsafeError(f"{path} belongs to another user ({status.st_uid})")
        sticky = status.st_mode & stat.S_ISVTX and not (to_write and path == end)
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & _OTHERS_WRITE and not sticky:
            raise _UnsafeError(f"other users can write to {path}")

    end = follow(str(place), lambda path, status: None)
    return Path(follow(str(place), require_safe))


def _trusted() -> tuple[int, ...]:
    return _ROOT, os.geteuid()


def _make(place: Path) -> None:
    """Make the folder, and those above that are missing, private to the user."""
    _safe(place.parent, to_write=False)
    missing = [folder for folder in place.parents if not folder.exists()]
    for folder in (*reversed(missing), place):  # mkdir's mode does not reach the parents
        folder.mkdir(mode=0o700, exist_ok=True)
    # The platform's folder is gpuback's own. What others have put there stays refused: it is theirs.
    if os.name == "posix" and not os.environ.get(ENVIRONMENT):
        status = place.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & 0o077:
            place.chmod(0o700)


@functools.cache
def _temporary_folder() -> Path:
    place = Path(tempfile.mkdtemp(prefix="gpuback-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _seal(key: str, content: bytes, record: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps([key, len(content), record], sort_keys=True).encode())
    sha.update(content)
    return sha.hexdigest()


def _read(place: Path, key: str, suffix: str) -> Entry | None:
    path = place / (key + suffix)
    try:
        head = json.loads(_content(place / f"{key}.json"))
        content = _content(path)
        sound = head["bytes"] == len(content) and head["sha256"] == _seal(key, content, head["record"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return Entry(path, head["record"]) if sound else None


def _content(path: Path) -> bytes:
    """Read a file that is no link, pipe or device, and that nobody else can write to."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, os.O_RDONLY | flags)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _UnsafeError(f"{path} is no file")
        if os.name == "posix" and (status.st_uid not in _trusted() or status.st_mode & _OTHERS_WRITE):
            raise _UnsafeError(f"other users can write to {path}")
        return file.read()


def _write(place: Path, key: str, suffix: str, content: bytes, record: Mapping[str, Any]) -> Entry:
    # A reader that comes between the two writes finds no matching seal: the entry counts as absent.
    found: dict[str, Any] = json.loads(json.dumps(record))  # what a reader will see: lists for tuples
    head = {"bytes": len(content), "sha256": _seal(key, content, found), "record": found}
    path = place / (key + suffix)
    for file_path, file_content in ((path, content), (place / f"{key}.json", json.dumps(head, indent=1).encode())):
        with replacing(file_path, anew=True) as file:
            file.write(file_content)
    return Entry(path, found)
