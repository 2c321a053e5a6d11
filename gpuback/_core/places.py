"""Where a path leads: every folder and link on the way, and what stands at its end."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from typing import NamedTuple

from gpuback._core.typing import PathLike
from gpuback.errors import OutputFileError

_MOST_LINKS = 40  # as many as Linux follows
_DESCRIPTOR = re.compile(r"/proc/(?P<process>\d+)(?:/task/\d+)?/fd/(?P<number>\d+)|/dev/fd/(?P<own>\d+)")

Visit = Callable[[str, os.stat_result], None]


class Place(NamedTuple):
    """The end of a path.

    Attributes:
        path: absolute, without links.
        descriptor: the number of this process's open file that it stands for, as /dev/stdout does; else None.
        mode: the type and permission bits of what is there; None for nothing.
    """

    path: str
    descriptor: int | None
    mode: int | None

    @property
    def is_stream(self) -> bool:
        """Whether bytes are handed on there (a terminal, a pipe, /dev/null, /dev/stdout) rather than kept as a file."""
        return self.descriptor is not None or (
            self.mode is not None and (stat.S_ISFIFO(self.mode) or stat.S_ISCHR(self.mode))
        )


def place_of(path: PathLike) -> Place:
    """Find the end of a path as `open` does where fs.protected_symlinks is on, whether or not it is.

    Raises:
        OutputFileError: a link that another user put into a folder that everybody can write to; or an open file of
            another process.
        OSError: the path is too long, has a file where a folder should be, or goes round in a circle.
    """
    name = os.fspath(path)

    def visit(place: str, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode) and not may_follow(status, os.lstat(os.path.dirname(place))):
            raise OutputFileError(
                f"cannot write {name}: {place} is a link of user {status.st_uid}'s in a folder that everybody can write"
                " to; remove it, or write elsewhere"
            )

    end = follow(name, visit)
    if match := _DESCRIPTOR.fullmatch(end):
        if match["process"] not in (None, str(os.getpid())):
            raise OutputFileError(f"cannot write {name}: it is an open file of another process")
        descriptor = int(match["number"] or match["own"])
        try:
            return Place(end, descriptor, os.fstat(descriptor).st_mode)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None
    try:
        return Place(end, None, os.lstat(end).st_mode)
    except FileNotFoundError:
        return Place(end, None, None)


def may_follow(link: os.stat_result, folder: os.stat_result) -> bool:
    """Say whether a link may be trusted: nobody else could have put it there.

    That is Linux's rule for fs.protected_symlinks, in folders without the sticky bit too.
    """
    return not folder.st_mode & stat.S_IWOTH or link.st_uid in (os.geteuid(), folder.st_uid)


def follow(path: str, visit: Visit) -> str:
    """Follow all links of a path, `visit` each folder and link on the way and its end, and return that end.

    `visit` gets the absolute path of one and its own status. What does not exist is not visited. Links in /proc that
    stand for open files are not followed: what they say is no path.
    """
    if os.name != "posix":
        return os.path.realpath(path)
    absolute = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    rest = absolute.split("/")[::-1]
    here, links = "/", 0
    visit(here, os.lstat(here))
    while rest:
        part = rest.pop()
        if part in ("", "."):
            continue
        if part == "..":
            here = os.path.dirname(here)
            continue
        following = os.path.join(here, part)
        try:
            status = os.lstat(following)
        except FileNotFoundError:
            here = following
            continue
        visit(following, status)
        if not stat.S_ISLNK(status.st_mode) or _DESCRIPTOR.fullmatch(following):
            here = following
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(following)
        rest.extend(target.split("/")[::-1])
        if os.path.isabs(target):
            here = "/"
    return here
