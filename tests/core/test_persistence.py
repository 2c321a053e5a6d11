"""_core/persistence.py: what was written comes back to the bit; what is damaged is refused; writes are whole or not."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gpuback
from gpuback._core import persistence
from gpuback._core.persistence import read, write
from gpuback.errors import DtypeError, FileFormatError, GpubackError, MissingFolderError, OptionError

DTYPES = ["float32", "float64", "float16", "int64", "int32", "uint8", "uint64", "bool"]
ARRAYS = {"theta": np.array([1.5, -2.0], np.float32), "step": np.array(7)}
KILLS = int(os.environ.get("GPUBACK_TEST_KILLS", "4"))
SAVES = int(os.environ.get("GPUBACK_TEST_SAVES", "50"))
METADATA = {"sizes": [2, 1], "best": 0.25}

posix_only = pytest.mark.skipif(os.name != "posix", reason="permission bits and links as POSIX has them")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    write(path, ARRAYS, METADATA, kind="model")
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("persistence") / "file"


def assert_same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert array.tobytes() == expected[name].tobytes()


def forge(path: Path, **changes: object) -> None:
    """Rewrite the header's strings as a forger would: the safetensors file is sound, its content is not."""
    with safetensors.safe_open(path, framework="np") as opened:
        header = json.loads(opened.metadata()["gpuback"]) | changes
    kept = {name: value for name, value in header.items() if value is not None}
    path.write_bytes(safetensors.numpy.save(ARRAYS, {"gpuback": json.dumps(kept)}))


# --- round trip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
array_names = st.text().filter(lambda name: name != "__metadata__")
any_array = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))


@settings(deadline=None)
@given(
    arrays=st.dictionaries(array_names, any_array, max_size=3),
    metadata=st.dictionaries(st.text(), json_values, max_size=3),
    kind=st.text(),
)
def test_round_trip(scratch: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any], kind: str) -> None:
    write(scratch, arrays, metadata, kind=kind)
    arrays_read, metadata_read = read(scratch, kind=kind)
    assert_same(arrays_read, arrays)
    assert metadata_read == metadata
    for array in arrays_read.values():
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata


def test_strides_byte_order_and_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "file"
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    odd = {"transposed": grid.T, "reversed": grid[:, ::-1], "big": grid.astype(">f4"), "row": grid.astype("bfloat16")}
    write(path, odd, {}, kind="model")
    arrays, _ = read(path, kind="model")
    assert_same(
        arrays,
        {
            "transposed": grid.T.copy(),
            "reversed": grid[:, ::-1].copy(),
            "big": grid,
            "row": grid.astype(ml_dtypes.bfloat16),
        },
    )


def test_metadata_holds_large_integers_and_infinity(tmp_path: Path) -> None:
    path = tmp_path / "file"
    metadata = {"pcg64": 2**127 + 1, "best": float("inf")}
    write(path, {}, metadata, kind="checkpoint")
    assert read(path, kind="checkpoint") == ({}, metadata)


def test_any_safetensors_reader_opens_it(file: Path) -> None:
    assert_same(safetensors.numpy.load_file(file), ARRAYS)


def test_same_content_makes_the_same_file(file: Path) -> None:
    before = file.read_bytes()
    write(file, ARRAYS, METADATA, kind="model")
    assert file.read_bytes() == before


# --- what is refused


def test_every_truncation_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=rf"net\.safetensors: expected .* found .*{length}\b"):
            read(file, kind="model")


def test_trailing_bytes_are_refused(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(FileFormatError, match=f"expected {size} bytes, found {size + 1}"):
        read(file, kind="model")


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_every_flipped_byte_is_refused(file: Path, flip: int) -> None:
    whole = file.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        file.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"net\.safetensors"):
            read(file, kind="model")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0 bytes"),
        (b"PK\x03\x04 and so on", "at byte 8, found"),
        ((2**60).to_bytes(8, "little") + b"{}", f"ends at byte {2**60 + 8}, found the file's end at byte 10"),
        ((90_000_000).to_bytes(8, "little") + b"{}", "ends at byte 90000008, found the file's end at byte 10"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ', "malformed"),
        ((2).to_bytes(8, "little") + b"{}", "found a safetensors file of another program"),
    ],
    ids=["empty", "zip", "absurd header", "large header", "no tensor", "no metadata"],
)
def test_what_gpuback_did_not_write_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="other: expected") as caught:
        read(path, kind="model")
    assert found in str(caught.value)


def test_an_absurd_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 16], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(FileFormatError, match="contradicts itself"):
        read(path, kind="model")


def test_another_programs_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torch.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, {"format": "pt"})
    with pytest.raises(
        FileFormatError, match=r"torch\.safetensors: expected a gpuback model, found .* another program"
    ):
        read(path, kind="model")


def test_another_kind_is_refused(file: Path) -> None:
    with pytest.raises(FileFormatError, match="expected a gpuback checkpoint, found a gpuback model"):
        read(file, kind="checkpoint")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected format version 1, found 2"),
        ({"metadata": json.dumps({"sizes": [3, 1]})}, "expected content with SHA-256"),
        ({"sha256": "0" * 64}, "expected content with SHA-256 0000"),
        ({"sha256": None}, "expected version, kind, metadata, sha256 in gpuback's header"),
    ],
    ids=["version", "metadata", "digest", "no digest"],
)
def test_a_forged_header_is_refused(file: Path, changes: dict[str, object], message: str) -> None:
    forge(file, **changes)
    with pytest.raises(FileFormatError, match=message):
        read(file, kind="model")


def test_a_kind_cannot_be_relabelled(file: Path) -> None:
    forge(file, kind="checkpoint")
    with pytest.raises(FileFormatError, match="SHA-256"):
        read(file, kind="checkpoint")


def test_swapped_names_are_refused(file: Path) -> None:
    same_length = {"a": np.zeros(2), "b": np.ones(2)}
    write(file, same_length, {}, kind="model")
    file.write_bytes(file.read_bytes().replace(b'"a":', b'"?":').replace(b'"b":', b'"a":').replace(b'"?":', b'"b":'))
    with pytest.raises(FileFormatError, match="SHA-256"):
        read(file, kind="model")


def resealed(path: Path, arrays: dict[str, np.ndarray], metadata_json: object) -> None:
    """Write a file whose hash fits, as a forger would."""
    digest = persistence._digest(arrays, metadata_json, "model") if isinstance(metadata_json, str) else "0" * 64
    header = {"version": 1, "kind": "model", "metadata": metadata_json, "sha256": digest}
    path.write_bytes(safetensors.numpy.save(arrays, {"gpuback": json.dumps(header)}))


@pytest.mark.parametrize(
    ("metadata_json", "message"),
    [
        ("[1]", "expected metadata by name, found list"),
        ("{", "expected metadata in JSON"),
        ('{"a": ' + "9" * 5000 + "}", "expected metadata in JSON"),
        ("[" * 100_000, "expected metadata in JSON"),
        ({"a": 1}, "expected metadata and sha256 as texts"),
        (None, "expected metadata and sha256 as texts"),
    ],
    ids=["list", "half", "long number", "nested without end", "object", "none"],
)
def test_forged_metadata_are_refused(tmp_path: Path, metadata_json: object, message: str) -> None:
    resealed(tmp_path / "file", ARRAYS, metadata_json)
    with pytest.raises(FileFormatError, match=message):
        read(tmp_path / "file", kind="model")


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("F8_E8M0", [4], "array 'a': expected a dtype of .*, found F8_E8M0"),
        ("F32", [0, 2**62], "array 'a': expected the shape of an array"),
        ("U8", [1] * 70 + [4], "array 'a': expected the shape of an array"),
    ],
)
def test_an_array_that_numpy_cannot_hold_is_refused(tmp_path: Path, dtype: str, shape: list[int], message: str) -> None:
    size = 0 if 0 in shape else 4
    seal = {"version": 1, "kind": "model", "metadata": "{}", "sha256": "0" * 64}
    header = {
        "__metadata__": {"gpuback": json.dumps(seal)},
        "a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]},
    }
    start = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(start).to_bytes(8, "little") + start + bytes(size))
    with pytest.raises(FileFormatError, match=message):
        read(tmp_path / "file", kind="model")


def test_a_file_that_is_truncated_while_it_is_read_ends_no_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped one would: SIGBUS."""

    def truncate(content: bytes) -> Any:
        os.truncate(file, 0)
        return deserialize(content)

    deserialize = persistence.deserialize
    monkeypatch.setattr(persistence, "deserialize", truncate)
    assert_same(read(file, kind="model")[0], ARRAYS)
    with pytest.raises(FileFormatError, match="found 0 bytes"):
        read(file, kind="model")


@posix_only
def test_a_pipe_and_a_device_are_no_safetensors_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FileFormatError, match="found a pipe or device"):
            read(path, kind="model")


def test_a_missing_file_is_what_python_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent", kind="model")


# --- all or nothing


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFolderError, match="there is no folder .*absent") as caught:
        write(tmp_path / "absent" / "file", ARRAYS, METADATA, kind="model")
    assert isinstance(caught.value, GpubackError) and isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "message"),
    [
        ({"a": np.array([None])}, {}, DtypeError, "object"),
        ({"a": np.zeros(1, np.complex128)}, {}, DtypeError, "complex128"),
        ({"__metadata__": np.zeros(1)}, {}, OptionError, "__metadata__"),
        ({"\ud800": np.zeros(1)}, {}, OptionError, "UTF-8"),
        ({}, {"a": np.zeros(1)}, DtypeError, "JSON"),
    ],
    ids=["object", "complex", "reserved name", "surrogate", "array in metadata"],
)
def test_what_cannot_be_stored_is_refused_and_leaves_the_old_file(
    file: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = file.read_bytes()
    with pytest.raises(error, match=message):
        write(file, arrays, metadata, kind="model")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_litter(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    before = file.read_bytes()
    monkeypatch.setattr(os, call, fail)
    for target in (file, file.parent / "new"):
        with pytest.raises(type(failure)):
            write(target, {"theta": np.zeros(3)}, {}, kind="model")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_folder_that_cannot_be_synced_is_no_failure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_open(*_: object) -> int:
        raise PermissionError("a folder cannot be opened on Windows")

    monkeypatch.setattr(os, "open", cannot_open)
    write(file, {}, {"new": True}, kind="model")
    monkeypatch.undo()
    assert read(file, kind="model") == ({}, {"new": True})


def test_writers_at_the_same_time_do_not_mix(file: Path) -> None:
    def write_often(value: int) -> None:
        for _ in range(5):
            write(file, {"theta": np.full(1000, value)}, {"value": value}, kind="model")

    writers = [threading.Thread(target=write_often, args=(value,)) for value in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    arrays, metadata = read(file, kind="model")
    assert (arrays["theta"] == metadata["value"]).all()
    assert os.listdir(file.parent) == [file.name]


def test_an_array_that_changes_while_it_is_saved_makes_a_sound_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = np.zeros(3)

    def digest_of(arrays: dict[str, np.ndarray], metadata_json: str, kind: str) -> str:
        value = digest(arrays, metadata_json, kind)
        theta[...] = 1  # as a step of training in another thread
        return value

    digest = persistence._digest
    with monkeypatch.context() as patched:
        patched.setattr(persistence, "_digest", digest_of)
        write(file, {"theta": theta}, {}, kind="model")
    assert_same(read(file, kind="model")[0], {"theta": np.zeros(3)})


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path, ARRAYS, METADATA, kind="model")
    assert_same(read(path, kind="model")[0], ARRAYS)


@posix_only
def test_permission_bits_are_those_that_open_gives(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write(tmp_path / "new", {}, {}, kind="model")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@posix_only
def test_permission_bits_of_a_replaced_file_stay(file: Path) -> None:
    file.chmod(0o600)
    write(file, {}, {}, kind="model")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@posix_only
def test_a_symbolic_link_stays_a_link(file: Path) -> None:
    link = file.parent / "latest"
    link.symlink_to(file.name)
    write(link, {}, {"new": True}, kind="model")
    assert link.is_symlink()
    assert read(file, kind="model")[1] == {"new": True}


@pytest.mark.thorough
def test_a_network_may_be_saved_while_another_thread_trains_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 20)), rng.integers(3, size=64)
    net = gpuback.MLP([20, 64, 64, 3], seed=0, backend="numpy")
    step = gpuback.TrainStep(net, gpuback.Adam(0.01))
    done = threading.Event()

    def train() -> None:
        while not done.is_set():
            step(x, y)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for _ in range(SAVES):
            net.save(tmp_path / "net")
            gpuback.MLP.load(tmp_path / "net", backend="numpy")
    finally:
        done.set()
        trainer.join()
    assert os.listdir(tmp_path) == ["net"]


SAVER = """
import sys, threading
import numpy as np
import gpuback

rng = np.random.default_rng(0)
x, y = rng.standard_normal((64, 20)), rng.integers(3, size=64)
net = gpuback.MLP([20, 64, 64, 3], seed=0, backend="numpy")
step = gpuback.TrainStep(net, gpuback.Adam(0.01))

def train():
    while True:
        step(x, y)

threading.Thread(target=train, daemon=True).start()
while True:
    net.save(sys.argv[1])
    print(flush=True)
"""


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_process_that_is_killed_while_it_trains_and_saves_leaves_a_sound_file(tmp_path: Path) -> None:
    root = str(Path(gpuback.__file__).parents[1])
    file, seed = tmp_path / "net", random.randrange(2**32)
    print(f"random.Random({seed})")  # pytest shows it if the test fails
    moments = random.Random(seed)
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(file)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
        ) as saver:
            for _ in range(moments.randint(1, 5)):
                saver.stdout.readline()
            time.sleep(moments.uniform(0, 0.005))
            saver.kill()
        gpuback.MLP.load(file, backend="numpy")
    litter = [tmp_path / name for name in os.listdir(tmp_path) if name != file.name]
    for path in litter:
        os.utime(path, (0, 0))
    write(file, ARRAYS, METADATA, kind="model")
    assert os.listdir(tmp_path) == [file.name]
    print(f"{KILLS} kills, {len(litter)} unfinished files")


MODEL_ODD = (
    *(None, -1, 1.5, "x", [], {}, float("nan"), 2**70, [1], {"a": 1}, [2**62, 2**62], [True, 2], ["relu", 1], [[]]),
    *([{}], {"name": []}, {"name": "huber", "delta": []}, {"name": "cross_entropy", "class_weights": [[]]}),
)


@pytest.mark.parametrize(
    "field", ["architecture", "sizes", "activation", "output", "loss", "dtype", "allow_tf32", "reproducible", "more"]
)
def test_a_forged_model_is_refused(file: Path, field: str) -> None:
    net = gpuback.MLP([2, 3, 2], seed=0, backend="numpy")
    net.save(file)
    arrays, metadata = read(file, kind="model")
    for value in MODEL_ODD:
        whole = value if field == "architecture" else {**metadata["architecture"], field: value}
        write(file, arrays, {"architecture": whole}, kind="model")
        with pytest.raises(FileFormatError, match="net.safetensors: expected a gpuback model"):
            gpuback.MLP.load(file, backend="numpy")


def test_a_model_of_absurd_size_is_refused_in_few_words(file: Path) -> None:
    gpuback.MLP([2, 3, 2], seed=0, backend="numpy").save(file)
    arrays, metadata = read(file, kind="model")
    for sizes, said in (([2] * 10_001, "expected theta of shape"), ([2**62, 5, 2**62], "GiB")):
        changes = {"sizes": sizes, "activation": ["relu"] * (len(sizes) - 2)}
        write(file, arrays, {"architecture": metadata["architecture"] | changes}, kind="model")
        with pytest.raises(FileFormatError, match=said) as caught:
            gpuback.MLP.load(file, backend="numpy")
        assert len(str(caught.value)) < 1000
