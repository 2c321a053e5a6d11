"""Files that somebody has changed: each parser reads them or raises a typed error, soon and in little memory.

Hypothesis changes sound files; it keeps what failed and tries it first the next time. `GPUBACK_TEST_MUTANTS` says how
many changes each parser gets.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gpuback
from gpuback import datasets
from gpuback._core import persistence
from gpuback._cuda import cache
from gpuback._text import MOST_IN_MESSAGE
from gpuback.errors import GpubackError

MUTANTS = int(os.environ.get("GPUBACK_TEST_MUTANTS", "200"))
MOST_SECONDS = 5.0
MOST_BYTES = 1 << 30

fuzzed = settings(max_examples=MUTANTS, deadline=None, suppress_health_check=list(HealthCheck))


class Edit(NamedTuple):
    """One change: what stands at `place`, a fraction of the file, is removed, and `new` comes in."""

    place: float
    removed: int
    new: bytes

    def apply(self, content: bytes) -> bytes:
        start = int(self.place * len(content))
        return content[:start] + self.new + content[start + self.removed :]


TELLING = (
    *(b"\0", b"\xff", b"9", b"-", b"{", b"[", b'"', b",", b"\n", b"0", b"1e999", b"nan", b"\xff" * 8, b"\x7f" * 4),
    *(b"\x1b[2J", "\x9b\u202e".encode(), b"9" * 5000, b"x" * 200_000),
)
edit = st.builds(
    Edit,
    st.floats(0, 1),
    st.sampled_from((0, 1, 1, 1, 2, 4, 8, 100, 10**6)),
    st.one_of(st.sampled_from(TELLING), st.binary(max_size=9)),
)
edits = st.lists(edit, min_size=1, max_size=4)

TEMPTING = ([[]], [{}], [2**62, 2**62], {"name": []}, {"name": "huber", "delta": []}, ["relu", 1], {"function": []})
numbers = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9)),
    *(st.just(10**12), st.sampled_from(TEMPTING)),
)
values = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def edited(content: bytes, changes: list[Edit]) -> bytes:
    for change in changes:
        content = change.apply(content)
    return content


def answers(read: Callable[[], object]) -> None:
    """Hold that it reads something or raises one of gpuback's errors, with a message for any terminal."""
    before, started = _peak_bytes(), time.monotonic()
    try:
        read()
    except GpubackError as error:
        assert len(str(error)) <= MOST_IN_MESSAGE
        assert str(error).isprintable()
    assert time.monotonic() - started < MOST_SECONDS
    assert _peak_bytes() - before < MOST_BYTES


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


# --- models and checkpoints


def network() -> gpuback.MLP:
    return gpuback.MLP([3, 4, 2], seed=0, backend="numpy")


def train(file: Path, epochs: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)), np.arange(20) % 2
    options: dict[str, Any] = {"seed": 1, "validation": 0.2, "checkpoint": file, "resume": epochs > 1}
    gpuback.fit(network(), x, y, optimizer=gpuback.Adam(0.1), epochs=epochs, **options)


def load(file: Path) -> None:
    gpuback.MLP.load(file, backend="numpy")


def save_with_schema(file: Path) -> None:
    table = file.with_suffix(".csv")
    table.write_text(
        "size,colour,price\n" + "".join(f"{i / 7},{'red' if i % 3 else 'blue'},{i}.5\n" for i in range(30))
    )
    schema = datasets.Schema.fit(table)
    gpuback.MLP([schema.n_inputs, 1], loss="squared_error", seed=0).save(file, schema=schema)


def use_schema(file: Path) -> None:
    schema = datasets.Schema.load(file)
    if schema is not None:
        schema.transform(file.with_name("sound.csv"))


def sound(kind: str, folder: Path) -> Path:
    path = folder / f"sound.{kind}"
    if not path.exists():
        SAVERS[kind](path)
    return path


SAVERS = {
    "model": lambda file: network().save(file),
    "schema": save_with_schema,
    "checkpoint": lambda file: train(file, 1),
}
READERS = {"model": load, "schema": use_schema, "checkpoint": lambda file: train(file, 2)}
FILE_KINDS = {"model": "model", "schema": "model", "checkpoint": "checkpoint"}


@pytest.mark.parametrize("kind", READERS)
@fuzzed
@given(changes=edits)
def test_models_and_checkpoints_with_other_bytes(folder: Path, kind: str, changes: list[Edit]) -> None:
    path = folder / "mutant"
    path.write_bytes(edited(sound(kind, folder).read_bytes(), changes))
    answers(lambda: READERS[kind](path))


@pytest.mark.parametrize("kind", READERS)
@fuzzed
@given(data=st.data())
def test_models_and_checkpoints_with_other_contents_and_a_hash_that_fits(
    folder: Path, kind: str, data: st.DataObject
) -> None:
    arrays, metadata = persistence.read(sound(kind, folder), kind=FILE_KINDS[kind])
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from([*arrays, "more"]))
            shape = data.draw(st.lists(st.sampled_from((0, 1, 2, 26)), max_size=3))
            dtype = data.draw(st.sampled_from(("float32", "float64", "bool", "int64", "bfloat16")))
            arrays[name] = np.zeros(shape, dtype)
        else:
            part = data.draw(
                st.sampled_from([metadata, *(inner for inner in metadata.values() if isinstance(inner, dict))])
            )
            part[data.draw(st.sampled_from([*part, "more"]))] = data.draw(values)
    path = folder / "forged"
    try:
        persistence.write(path, arrays, metadata, kind=FILE_KINDS[kind])
    except GpubackError:
        return  # a name that UTF-8 cannot hold
    answers(lambda: READERS[kind](path))


@pytest.mark.parametrize("kind", READERS)
@fuzzed
@given(changes=edits)
@example(changes=[Edit(0.0, 10**6, b"[" * 100_000)])
@example(changes=[Edit(0.5, 1, b"9" * 5000)])
def test_models_and_checkpoints_with_other_metadata_and_a_hash_that_fits(
    folder: Path, kind: str, changes: list[Edit]
) -> None:
    arrays, metadata = persistence.read(sound(kind, folder), kind=FILE_KINDS[kind])
    text = edited(json.dumps(metadata).encode(), changes).decode("utf-8", "replace")
    digest = persistence._digest(arrays, text, FILE_KINDS[kind])
    header = {"version": 1, "kind": FILE_KINDS[kind], "metadata": text, "sha256": digest}
    path = folder / "resealed"
    path.write_bytes(safetensors.numpy.save(arrays, {"gpuback": json.dumps(header)}))
    answers(lambda: READERS[kind](path))


# --- data sets

X, Y = np.arange(210.0).reshape(30, 7), np.arange(30) % 3


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


CSV = (
    "a,b,y\n"
    + "".join(f"{a!r},{b!r},{y}\n" for a, b, y in zip(X[:, 0].tolist(), (X[:, 1] / 7).tolist(), Y, strict=True))
).encode()
WORDS = "a;b;y\n" + "".join(f'{i},5;"{"uvw"[i % 3]}";{"no" if i % 3 else "yes"}\n' for i in range(30))
FILES: dict[str, tuple[str, Callable[[list[Edit]], bytes]]] = {
    "npz": ("mutant.npz", lambda changes: edited(npz(x=npy(X), y=npy(Y)), changes)),
    "npz members": ("mutant.npz", lambda changes: npz(x=edited(npy(X), changes), y=npy(Y))),
    "npz headers": ("mutant.npz", lambda changes: npz(x=edited(npy(X)[:128], changes) + npy(X)[128:], y=npy(Y))),
    "idx": ("train-images-idx3-ubyte", lambda changes: edited(idx(X.reshape(30, 7, 1)), changes)),
    "idx headers": ("train-images-idx3-ubyte", lambda changes: edited(idx(X)[:12], changes) + idx(X)[12:]),
    "gzip": ("train-images-idx3-ubyte.gz", lambda changes: edited(gzip.compress(idx(X), mtime=0), changes)),
    "gzipped": ("train-images-idx3-ubyte.gz", lambda changes: gzip.compress(edited(idx(X), changes), mtime=0)),
    "csv": ("mutant.csv", lambda changes: edited(CSV, changes)),
    "csv of words": ("mutant.csv", lambda changes: edited(WORDS.encode(), changes)),
    "gzipped csv": ("mutant.csv.gz", lambda changes: gzip.compress(edited(CSV, changes), mtime=0)),
}


@pytest.mark.parametrize("kind", FILES)
@fuzzed
@given(changes=edits)
@example(changes=[Edit(0.0, 0, b"")])
def test_data_sets_with_other_bytes(folder: Path, kind: str, changes: list[Edit]) -> None:
    name, make = FILES[kind]
    (folder / name).write_bytes(make(changes))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(Y))
    answers(lambda: datasets.load(folder / name))


def test_the_unchanged_files_are_sound(folder: Path) -> None:
    for name, make in FILES.values():
        (folder / name).write_bytes(make([]))
        (folder / "train-labels-idx1-ubyte").write_bytes(idx(Y))
        assert len(datasets.load(folder / name).x) == 30
    load(sound("model", folder))
    train(sound("checkpoint", folder), 2)
    use_schema(sound("schema", folder))


# --- the kernel cache


@fuzzed
@given(in_record=st.booleans(), changes=edits)
def test_a_cached_kernel_is_whole_or_absent(folder: Path, in_record: bool, changes: list[Edit]) -> None:
    entry = cache._write(folder, "key", ".cubin", b"machine code" * 9, {"kernels": {}, "warnings": []})
    path = entry.path.with_suffix(".json") if in_record else entry.path
    path.write_bytes(edited(path.read_bytes(), changes))
    found = cache._read(folder, "key", ".cubin")
    if found is not None:
        assert found == entry
        assert entry.path.read_bytes() == b"machine code" * 9
