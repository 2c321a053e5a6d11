"""Compiled kernels on disk: found again by a key, checked before they are used, safe to share between processes.

An entry is two files: its content (KEY.cubin, a plain file that CUDA loads by path) and KEY.json, which says how long
the content is, seals both with SHA-256, and carries a record of whatever the writer wants to know later. An entry that
is cut short, changed, or another's counts as absent, and is written anew.

The folder is `GPUBACK_CACHE_DIR` where that is set, taken as it is; else gpuback/kernels in the platform's folder for
caches, private to the user: $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on
Windows. Where it cannot be written, a temporary folder serves until the process ends. It may be deleted at any time.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpuback._core.output_files import replacing
from gpuback.errors import BackendError

ENVIRONMENT = "GPUBACK_CACHE_DIR"
_LEFTOVER_SECONDS = 24 * 3600  # no write takes a day, on any machine


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
    """Return the entry of that key, if there is one and it is sound."""
    with contextlib.suppress(OSError):
        place = folder()
        if os.environ.get(ENVIRONMENT) or _is_private(place):
            entry = _read(place, key, suffix)
            if entry is not None:
                return entry
    return _read(_temporary_folder(), key, suffix) if _temporary_folder.cache_info().currsize else None


def keep(key: str, suffix: str, content: bytes, record: Mapping[str, Any]) -> Entry:
    """Write an entry, or take the one that another process has just written.

    Raises:
        BackendError: there is no place to write to.
    """
    try:
        place = folder()
        _make(place)
        return _write(place, key, suffix, content, record)
    except OSError as error:
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


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept, so every process compiles them anew ({reason}); "
        f"set {ENVIRONMENT} to a folder that can be written",
        RuntimeWarning,
        stacklevel=4,
    )


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


def _is_private(place: Path) -> bool:
    """Say whether only this user could have put files there. The GPU would run them."""
    if os.name != "posix":
        return True
    status = place.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _make(place: Path) -> None:
    """Make the folder, private to the user. One that was chosen by name is taken as it is."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and not os.environ.get(ENVIRONMENT):
        status = place.stat()
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{place} belongs to another user")
        if stat.S_IMODE(status.st_mode) & 0o077:
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
        head = json.loads((place / f"{key}.json").read_bytes())
        content = path.read_bytes()
        sound = head["bytes"] == len(content) and head["sha256"] == _seal(key, content, head["record"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return Entry(path, head["record"]) if sound else None


def _write(place: Path, key: str, suffix: str, content: bytes, record: Mapping[str, Any]) -> Entry:
    # A reader that comes between the two writes finds no matching seal: the entry counts as absent.
    found: dict[str, Any] = json.loads(json.dumps(record))  # what a reader will see: lists for tuples
    head = {"bytes": len(content), "sha256": _seal(key, content, found), "record": found}
    path = place / (key + suffix)
    _remove_leftovers(place)
    with replacing(path) as file:
        file.write(content)
    with replacing(place / f"{key}.json") as file:
        file.write(json.dumps(head, indent=1).encode())
    return Entry(path, found)


def _remove_leftovers(place: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for leftover in place.glob(".gpuback-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
