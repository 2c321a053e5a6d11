"""_core/output_files.py: files are whole or not there; pipes are written into; links and leftovers of others."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from gpuback._core import output_files, places
from gpuback._core.output_files import remove_leftovers, replacing, require_distinct, require_writable
from gpuback.errors import GpubackError, MissingFolderError, OptionError, OutputFileError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permission bits, links and devices as POSIX has them")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def put(path: Path | str, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


def test_a_block_that_raises_leaves_the_old_file(file: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(file) as opened:
        opened.write(b"half")
        raise ZeroDivisionError
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == [file.name]


# --- what is no file


def test_a_pipe_gets_the_bytes_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_writable(pipe)
        put(pipe)
        assert os.read(reader, 9) == b"new"
        with pytest.raises(ZeroDivisionError), replacing(pipe) as opened:
            opened.write(b"half")
            raise ZeroDivisionError
        assert os.read(reader, 9) == b""
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    with pytest.raises(OutputFileError, match="pipe: expected a file, which is read again"):
        require_writable(pipe, regular=True)


def test_a_device_stays_a_device() -> None:
    terminal, device = os.openpty()
    try:
        require_writable(os.ttyname(device))
        put(os.ttyname(device))
        assert os.read(terminal, 9) == b"new"
    finally:
        os.close(terminal)
        os.close(device)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_an_open_file_is_written_on_where_it_stands(file: Path, folder: str) -> None:
    """As the shell's >> leaves /dev/stdout."""
    with file.open("ab") as opened:
        path = f"{folder}/{opened.fileno()}"
        require_writable(path)
        put(path)
        put(path)
    assert file.read_bytes() == b"oldnewnew"
    with file.open("rb") as opened, pytest.raises(PermissionError, match="cannot write"):
        require_writable(f"{folder}/{opened.fileno()}")
    with pytest.raises(OSError, match="Bad file descriptor"):
        put(f"{folder}/12345")


@pytest.mark.thorough
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_standard_output_may_be_given_by_name() -> None:
    code = "from gpuback._core.output_files import replacing\nwith replacing('/dev/stdout') as file: file.write(b'new')"
    root = str(Path(places.__file__).parents[2])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert (ran.stdout, ran.stderr) == (b"new", b"")


@pytest.mark.skipif(not os.path.isdir("/proc/1/fd"), reason="no /proc here")
def test_an_open_file_of_another_process_is_refused() -> None:
    with subprocess.Popen(["sleep", "60"]) as other, pytest.raises(OutputFileError, match="of another process"):
        try:
            put(f"/proc/{other.pid}/fd/1")
        finally:
            other.kill()


def test_a_socket_and_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.chdir(tmp_path)  # sockets' names are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for write in (put, require_writable):
            with pytest.raises(OutputFileError, match="socket: expected a file, .* found a socket"):
                write("socket")
    for write in (put, require_writable):
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            write(tmp_path)
        with pytest.raises(MissingFolderError, match="there is no folder"):
            write(tmp_path / "absent" / "file")


def test_outputs_are_files_of_their_own(file: Path) -> None:
    (file.parent / "hard").hardlink_to(file)
    (file.parent / "soft").symlink_to("new")  # there is nothing yet
    for outputs, inputs in (
        ((file, file), ()),
        ((file.parent / "." / "file",), (file,)),
        ((file.parent / "hard",), (file,)),
        ((file.parent / "soft", file.parent / "new"), ()),
    ):
        with pytest.raises(OptionError, match="would be overwritten: give every file"):
            require_distinct(outputs, inputs)
    require_distinct((file, file.parent / "new"), (file.parent / "absent", "/dev/null"))
    require_distinct(("/dev/null", "/dev/null"))


# --- links


def test_links_are_followed_as_open_follows_them(file: Path) -> None:
    folder = file.parent / "folder"
    folder.mkdir()
    (folder / "up").symlink_to("../file")
    (file.parent / "again").symlink_to(folder / "up")
    (file.parent / "aside").symlink_to("folder", target_is_directory=True)
    for path in (folder / "up", file.parent / "again", file.parent / "aside" / "up", folder / ".." / "file"):
        assert places.place_of(path).path == os.path.realpath(path) == str(file)
        with pytest.raises(OptionError, match="would be overwritten"):
            require_distinct([path], [file])
        put(path, path.name.encode())
        assert file.read_bytes() == path.name.encode()
        assert os.listdir(folder) == ["up"]
    (file.parent / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="Too many levels") as caught:
        put(file.parent / "circle")
    assert caught.value.filename == str(file.parent / "circle")


def test_a_file_made_anew_replaces_a_link_and_is_for_nobody_else_to_write(file: Path) -> None:
    link = file.parent / "link"
    link.symlink_to(file)
    file.chmod(0o666)
    previous = os.umask(0)
    try:
        for path in (link, file):
            with replacing(path, anew=True) as opened:
                opened.write(b"new")
            assert stat.S_IMODE(path.lstat().st_mode) == 0o644
            assert path is file or file.read_bytes() == b"old"
    finally:
        os.umask(previous)
    assert not link.is_symlink()
    assert (link.read_bytes(), file.read_bytes()) == (b"new", b"new")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a link away")
@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_another_users_link_in_a_folder_for_all_is_refused(file: Path, mode: int) -> None:
    shared = file.parent / "shared"
    shared.mkdir()
    shared.chmod(mode)
    for link, target in ((shared / "model", file), (shared / "folder", file.parent)):
        link.symlink_to(target)
        os.lchown(link, 12345, 12345)
    for path in (shared / "model", shared / "folder" / "file", shared / "folder" / "absent"):
        for write in (put, require_writable):
            with pytest.raises(OutputFileError, match="is a link of user 12345's in a folder that everybody can write"):
                write(path)
    assert file.read_bytes() == b"old"
    shared.chmod(0o775)  # now nobody else could have made it
    put(shared / "model")
    assert file.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("owner", "folder_owner", "folder_mode", "follow"),
    [
        (1, 2, 0o1777, False),
        (1, 2, 0o777, False),
        (1, 2, 0o775, True),
        (1, 1, 0o1777, True),
        (None, 2, 0o1777, True),
    ],
)
def test_whose_links_are_followed(owner: int | None, folder_owner: int, folder_mode: int, follow: bool) -> None:
    def status(mode: int, uid: int) -> os.stat_result:
        return os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))

    link = status(stat.S_IFLNK | 0o777, os.geteuid() if owner is None else os.geteuid() + owner)
    folder = status(stat.S_IFDIR | folder_mode, os.geteuid() + folder_owner)
    assert places.may_follow(link, folder) is follow


# --- leftovers

DEAD = ".gpuback-999999-0123456789abcdef.tmp"
ODD = (
    *(".gpuback-1-a.tmp", ".gpuback-x-0123456789abcdef.tmp", ".gpuback--1-0123456789abcdef.tmp", "other.tmp"),
    *(".gpuback-99999999999999999999-0123456789abcdef.tmp", f"x{DEAD}", f"{DEAD}.bak", f"{DEAD}\n"),
)


def age(path: Path, seconds: float = 2 * output_files.LEFTOVER_SECONDS) -> None:
    os.utime(path, (0, time.time() - seconds), follow_symlinks=False)


def test_leftovers_are_removed_once_they_are_old_and_nothing_else_is(file: Path) -> None:
    folder = file.parent
    earlier = ".gpuback-0123456789ab-1-0123456789abcdef.tmp"
    young = ".gpuback-1-1123456789abcdef.tmp"
    for name in (DEAD, earlier, young, *ODD):
        (folder / name).touch()
        if name != young:
            age(folder / name)
    (folder / ".gpuback-2-0123456789abcdef.tmp").symlink_to(file)
    age(folder / ".gpuback-2-0123456789abcdef.tmp")
    put(file)
    assert sorted(os.listdir(folder)) == sorted([young, *ODD, ".gpuback-2-0123456789abcdef.tmp", file.name])


@pytest.mark.thorough
def test_a_living_writers_file_stays_however_old(file: Path) -> None:
    code = f"""
import os, sys
from gpuback._core.output_files import replacing
with replacing({str(file)!r}) as opened:
    os.utime(opened.name, (0, 0))
    print(opened.name, flush=True)
    sys.stdin.read()
    opened.write(b"new")
"""
    root = str(Path(places.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as writer:
        temporary = Path(writer.stdout.readline().strip())
        remove_leftovers(str(file.parent))
        assert temporary.exists()
        writer.communicate()
    assert file.read_bytes() == b"new"
    temporary.touch()
    age(temporary)
    remove_leftovers(str(file.parent))
    assert not temporary.exists()


def test_another_users_leftover_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / DEAD).touch()
    age(file.parent / DEAD)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    remove_leftovers(str(file.parent))
    assert (file.parent / DEAD).exists()


# --- what the file system refuses


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize(
    ("call", "code", "lost"),
    [
        ("chmod", errno.EPERM, "its permission bits are 6.. and no longer 640"),
        ("fsync", errno.EINVAL, "a power cut may still lose it"),
        ("replace", errno.EBUSY, "in place, as it could not be replaced .*busy.*: a crash would have left half of it"),
    ],
)
def test_a_file_system_without_the_operation(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, lost: str
) -> None:
    file.chmod(0o640)
    inode = file.stat().st_ino
    refuse(monkeypatch, call, code)
    with pytest.warns(RuntimeWarning, match=f"file is written, but {lost}"):
        put(file, b"newer")
    assert file.read_bytes() == b"newer"
    assert (file.stat().st_ino == inode) is (call == "replace")
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["chmod", "fsync", "replace"])
def test_a_full_or_broken_disk_is_an_error_that_names_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    file.chmod(0o640)
    refuse(monkeypatch, call, code)
    with pytest.raises(OSError) as caught:
        put(file)
    assert (caught.value.errno, caught.value.filename) == (code, str(file))
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == [file.name]


def test_an_error_in_the_block_names_the_file(file: Path) -> None:
    with pytest.raises(OSError) as caught, replacing(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(file)
    with pytest.raises(FileNotFoundError) as caught, replacing(file):
        (file.parent / "another").read_bytes()
    assert caught.value.filename == str(file.parent / "another")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_what_cannot_be_finished_in_place_is_kept_beside(
    file: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(source: object, target: object) -> None:
        raise failure

    refuse(monkeypatch, "replace", errno.EBUSY)
    monkeypatch.setattr(output_files.shutil, "copyfileobj", fail)
    with pytest.raises((OutputFileError, KeyboardInterrupt)) as caught:
        put(file)
    (kept,) = (path for path in file.parent.iterdir() if path != file)
    assert kept.read_bytes() == b"new"
    if isinstance(failure, OSError):
        assert "could neither be replaced (" in str(caught.value) and str(caught.value).endswith(f" is in {kept}")
    age(kept)
    remove_leftovers(str(file.parent))
    assert kept.exists()


def test_a_file_that_can_be_neither_replaced_nor_written_stays(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "replace", errno.EBUSY)
    refuse(monkeypatch, "rename", errno.EPERM)
    with pytest.raises(OSError) as caught:
        put(file)
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, str(file))
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == [file.name]


def test_a_name_that_is_too_long_is_found_before(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 300)
    for write in (put, require_writable):
        with pytest.raises(OSError) as caught:
            write(path)
        assert (caught.value.errno, caught.value.filename) == (errno.ENAMETOOLONG, str(path))
    assert os.listdir(tmp_path) == []


def test_the_trial_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(file)
    require_writable(file.parent / "new")
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == b"old"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission to write to the folder"):
        require_writable(file)


def test_an_output_file_error_is_both(tmp_path: Path) -> None:
    assert issubclass(OutputFileError, GpubackError) and issubclass(OutputFileError, OSError)


def test_the_permission_bits_hold_from_the_start(file: Path) -> None:
    file.chmod(0o600)
    with warnings.catch_warnings(), replacing(file) as opened:
        assert stat.S_IMODE(os.stat(opened.name).st_mode) == 0o600
