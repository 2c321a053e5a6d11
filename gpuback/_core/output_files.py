"""Write a file so that afterwards its path holds all of it or, on failure, what it held before.

The bytes go to a temporary file beside it, which is then renamed. Terminals, pipes and devices are written into.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from gpuback._core.places import Place, place_of
from gpuback._core.typing import PathLike
from gpuback._text import shown
from gpuback.errors import MissingFolderError, OptionError, OutputFileError

try:
    import fcntl
except ImportError:  # Windows, which does not delete files that are open
    fcntl = None  # type: ignore[assignment]

LEFTOVER_SECONDS = 3600
"""A temporary file that nobody has written to for so long, and nobody holds locked, was left by a killed writer."""

_TEMPORARY = re.compile(r"\.gpuback-(?:[0-9a-f]{12}-)?[0-9]{1,10}-[0-9a-f]{16}\.tmp")

# What file systems answer that lack an operation: FAT and network mounts to chmod, FUSE to fsync, a file that is itself
# a mount point to rename. A full disk or a broken one is not among them.
_LACKING = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NOT_REPLACED = _LACKING | {errno.EBUSY, errno.EXDEV, errno.ETXTBSY}


@contextlib.contextmanager
def replacing(path: PathLike, *, anew: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` when the block ends, or vanishes if the block raises.

    The permission bits are those that `open(path, "wb")` would leave. A symbolic link stays, and what it points to is
    replaced. A terminal, pipe, device or open file such as /dev/stdout gets the bytes when the block ends. If the file
    system cannot sync, rename or set permissions, the file is written all the same, and a RuntimeWarning says what is
    lost.

    Args:
        path: the file.
        anew: whatever is at `path`, a link or a pipe too, is replaced, and nobody else may write to the new file.

    Raises:
        MissingFolderError: the folder does not exist.
        OutputFileError: `path` is no place for a file, or a link that another user may have planted.
        OSError: the file system refused. It names `path`.
    """
    name = os.fspath(path)
    place = _checked(name, _place_itself(name) if anew else place_of(name))
    if place.is_stream and not anew:
        content = io.BytesIO()
        yield content
        with _naming(name, None), _opened_stream(place) as stream:
            stream.write(content.getbuffer())
        return
    folder = os.path.dirname(place.path)
    remove_leftovers(folder)
    temporary = os.path.join(folder, f".gpuback-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    lost: list[str] = []
    try:
        with _naming(name, temporary), open(temporary, "xb") as file:
            _lock(file)
            if anew:
                _set_mode(file, stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o022, lost)
            elif place.mode is not None:
                _set_mode(file, stat.S_IMODE(place.mode), lost)
            yield file
            file.flush()
            _sync(file, lost)
        with _naming(name, temporary):
            _rename(temporary, place.path, lost)
    except BaseException:
        with contextlib.suppress(OSError):
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
    for loss in lost:
        warnings.warn(shown(f"{name} is written, but {loss}"), RuntimeWarning, stacklevel=4)


def require_writable(path: PathLike, *, regular: bool = False) -> None:
    """Raise before long work if a file could not be written at `path` after it. A file is made beside it to try.

    Args:
        path: the file.
        regular: the file is read again, so that a terminal, pipe or device will not do.

    Raises:
        MissingFolderError: there is no folder for it.
        IsADirectoryError: `path` itself is a folder.
        PermissionError: the folder cannot be written to.
        OutputFileError: `path` is no place for such a file.
        OSError: another reason of the file system's, such as a name that is too long. It names `path`.
    """
    name = os.fspath(path)
    place = _checked(name, place_of(name))
    if place.is_stream:
        if regular:
            raise OutputFileError(f"cannot write {name}: expected a file, which is read again, found a pipe or device")
        if not _takes_bytes(place):
            raise PermissionError(shown(f"cannot write {name}: no permission to write to it"))
        return
    folder = os.path.dirname(place.path)
    if not os.access(folder, os.W_OK):
        raise PermissionError(shown(f"cannot write {name}: no permission to write to the folder {folder}"))
    trial = os.path.join(folder, f".gpuback-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    with _naming(name, trial):
        open(trial, "xb").close()
        os.unlink(trial)


def require_distinct(outputs: Sequence[PathLike], inputs: Sequence[PathLike] = ()) -> None:
    """Raise before long work if an output would overwrite an input or another output, through whatever links.

    Args:
        outputs: where files are to be written. A stream overwrites nothing.
        inputs: what is read, where it exists.

    Raises:
        OptionError: two paths lead to one file.
        OSError: as `place_of`.
    """
    for one, other in itertools.combinations((*outputs, *filter(os.path.exists, inputs)), 2):
        if _same(one, other):
            raise OptionError(f"{os.fspath(one)} would be overwritten: give every file of the run a name of its own")


def _same(one: PathLike, other: PathLike) -> bool:
    ends = place_of(one), place_of(other)
    if any(end.is_stream for end in ends):
        return False
    if ends[0].path == ends[1].path:
        return True
    return None not in (ends[0].mode, ends[1].mode) and os.path.samefile(ends[0].path, ends[1].path)


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files that killed writers left in a folder.

    That is what has a temporary file's name exactly, belongs to this user, has not been written to for an hour, and is
    locked by nobody: a writer holds a lock, which containers on one machine see and which ends with its process.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_leftover(entry.path)


def _remove_leftover(path: str) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime < LEFTOVER_SECONDS:
        return
    if fcntl is None:
        os.unlink(path)
        return
    if status.st_uid != os.geteuid():
        return
    with open(path, "r+b") as file:  # some network mounts lock only what is open for writing
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _place_itself(name: str) -> Place:
    """Return the place of a file, not of what a link there points to."""
    folder, last = os.path.split(name)
    end = os.path.join(place_of(folder or ".").path, last)
    return Place(end, None, os.lstat(end).st_mode if os.path.lexists(end) else None)


def _checked(name: str, place: Place) -> Place:
    """Return the place if there can be a file, or a stream."""
    if place.is_stream:
        return place
    folder = os.path.dirname(place.path)
    if not os.path.isdir(folder):
        raise MissingFolderError(f"cannot write {name}: there is no folder {folder}; make it first")
    if place.mode is not None:
        if stat.S_ISDIR(place.mode):
            raise IsADirectoryError(shown(f"cannot write {name}: it is a folder"))
        if stat.S_ISSOCK(place.mode) or stat.S_ISBLK(place.mode):
            kind = "a socket" if stat.S_ISSOCK(place.mode) else "a disk"
            raise OutputFileError(f"cannot write {name}: expected a file, a pipe or a terminal, found {kind}")
    return place


@contextlib.contextmanager
def _naming(name: str, temporary: str | None) -> Iterator[None]:
    """Let errors of the file system name the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary):
            raise
        raise OSError(error.errno, error.strerror, name) from error


def _takes_bytes(place: Place) -> bool:
    if place.descriptor is None or fcntl is None:
        return os.access(place.path, os.W_OK)
    return fcntl.fcntl(place.descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _opened_stream(place: Place) -> BinaryIO:
    # A duplicate goes on where the shell's > or >> stands; opening the path anew would begin the file again.
    return open(place.path if place.descriptor is None else os.dup(place.descriptor), "wb")


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # where there are no locks, nobody takes the file for a leftover either
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _set_mode(file: BinaryIO, mode: int, lost: list[str]) -> None:
    """Give a new file these permission bits, before anything is in it."""
    found = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    if found != mode:
        try:
            os.chmod(file.fileno() if os.chmod in os.supports_fd else file.name, mode)
        except OSError as error:
            if error.errno not in _LACKING:
                raise
            lost.append(f"its permission bits are {found:o} and no longer {mode:o} ({error.strerror})")


def _sync(file: BinaryIO, lost: list[str]) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        lost.append(f"a power cut may still lose it ({error.strerror})")


def _rename(temporary: str, target: str, lost: list[str]) -> None:
    """Put the temporary file in the target's place; where that cannot be, write its content into the target."""
    try:
        os.replace(temporary, target)
        return
    except OSError as error:
        if os.name != "posix" or error.errno not in _NOT_REPLACED:
            raise
        refused = error
    # Under this name nobody removes it, whatever ends the copying.
    whole = temporary.removesuffix(".tmp") + ".whole"
    try:
        # O_CREAT, so that Linux's fs.protected_regular guards files of others in folders that everybody can write to.
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        os.rename(temporary, whole)
    except OSError:
        raise refused from None
    with open(whole, "rb") as source, open(descriptor, "wb") as file:
        try:
            file.truncate()
            shutil.copyfileobj(source, file)
            file.flush()
            _sync(file, lost)
        except OSError as error:
            raise OutputFileError(
                f"{target}: could neither be replaced ({refused.strerror}) nor written ({error.strerror}); its whole"
                f" content is in {whole}"
            ) from error
    os.unlink(whole)
    lost.append(f"in place, as it could not be replaced ({refused.strerror}): a crash would have left half of it")
