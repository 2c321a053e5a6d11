"""fit(net, batches=…): the bits of `fit` on arrays, two batches ahead and no more, and no thread left behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, SGD, Adam, DivergedError, History, LossScaling
from gpuback._training import checkpoint
from gpuback.errors import DataError, DtypeError, LabelError, OptionError, ShapeError
from gpuback.schedules import cosine

pytestmark = pytest.mark.on_each_backend

SIZE = 16


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "gpuback batches"]


def data(n: int = 75) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 4)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] > 0).astype(int)


def network(**options: Any) -> MLP:
    return MLP([4, 7, 2], **({"activation": "tanh", "seed": 0} | options))


def parts(*arrays: np.ndarray, size: int = SIZE) -> list[tuple[np.ndarray, ...]]:
    """The arrays, cut into batches; the last one is shorter."""
    return [tuple(array[start : start + size] for array in arrays) for start in range(0, len(arrays[0]), size)]


def shuffled(epoch: int) -> Iterator[tuple[np.ndarray, ...]]:
    """An epoch's batches in an order of its own."""
    batches = parts(*data())
    return (batches[i] for i in np.random.default_rng(epoch).permutation(len(batches)))


def train(net: MLP, *arrays: Any, make_optimizer: Callable[[], Any] = Adam, **options: Any) -> tuple[Any, ...]:
    """Everything that must be the same: θ, the optimizer, the history (but for its clock)."""
    optimizer = make_optimizer()
    history = gpuback.fit(net, *arrays, optimizer=optimizer, **({"epochs": 3} | options))
    state = {name: array.tobytes() for name, array in optimizer.state.items()}
    return net.theta.tobytes(), state, optimizer.step_count, replace(history, seconds=0.0)


# --- the bits of fit on arrays


SCALING = {"loss_scaling": LossScaling(2.0**20, growth_interval=2)}


@pytest.mark.on_each_backend(layers=True)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="Adam"),
        pytest.param({"make_optimizer": lambda: SGD(0.1, 0.9), "clip_norm": 0.1}, id="clipped"),
        pytest.param({"micro_batch_size": 5}, id="micro-batches"),
        pytest.param({"schedule": cosine(0.05, steps=12)}, id="schedule"),
        pytest.param({"validation": data(9), "patience": 1}, id="validation"),
        pytest.param({"network": {"reproducible": True}}, id="reproducible"),
        pytest.param({"network": {"dtype": "float64"}}, id="float64", marks=pytest.mark.thorough),
        pytest.param({"network": {"dtype": "float16"}} | SCALING, id="loss scaling", marks=pytest.mark.thorough),
    ],
)
def test_a_list_of_batches_gives_the_bits_of_arrays_in_their_order(options: Any) -> None:
    make = options.get("network", {})
    options = {name: value for name, value in options.items() if name != "network"}
    x, y = data()
    expected = train(network(**make), x, y, batch_size=SIZE, shuffle=False, **options)
    assert train(network(**make), batches=parts(x, y), **options) == expected


def test_every_form_of_batches_gives_the_same_bits() -> None:
    x, y = data()
    weight = np.random.default_rng(1).uniform(0.5, 2, len(x))
    batches = parts(x, y, weight)
    expected = train(network(), x, y, sample_weight=weight, batch_size=SIZE, shuffle=False)
    numbers: list[int] = []

    def of_epoch(epoch: int) -> Iterator[Any]:
        numbers.append(epoch)
        yield from batches

    class Sequence:
        def __getitem__(self, index: int) -> Any:
            return batches[index]

    class OfEpoch:
        def __init__(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Any]:
            return of_epoch(self.epoch)

    lists = [[array.tolist() for array in batch] for batch in batches]
    for given in (batches, Sequence(), of_epoch, OfEpoch, lists):
        assert train(network(), batches=given) == expected
    assert numbers == [0, 1, 2, 0, 1, 2]
    given = itertools.chain.from_iterable(itertools.repeat(batches))
    assert train(network(), batches=given, steps_per_epoch=len(batches)) == expected
    assert next(given) is batches[0]  # nothing beyond the last epoch was taken


def test_an_iterator_goes_on_from_epoch_to_epoch_and_from_run_to_run() -> None:
    taken: list[int] = []
    stream = (taken.append(i) or batch for i, batch in enumerate(itertools.cycle(parts(*data()))))
    net, optimizer = network(), Adam()
    for last in (6, 12):
        history = gpuback.fit(net, batches=stream, epochs=2, steps_per_epoch=3, optimizer=optimizer)
        assert (history.steps, taken) == (6, list(range(last)))
    assert optimizer.step_count == 12


def test_an_iterator_makes_one_epoch_to_its_end() -> None:
    history = gpuback.fit(network(), batches=iter(parts(*data())), epochs=1)
    assert (history.epochs, history.steps) == (1, 5)


def test_of_a_longer_list_an_epoch_takes_the_first_steps_per_epoch() -> None:
    x, y = data()
    expected = train(network(), x[: 2 * SIZE], y[: 2 * SIZE], batch_size=SIZE, shuffle=False)
    assert train(network(), batches=parts(x, y), steps_per_epoch=2) == expected


def test_sizes_and_weights_may_change_from_batch_to_batch() -> None:
    x, y = data(40)
    batches = [(x[:3], y[:3]), [x[3:20], y[3:20], np.ones(17)], (x[20:21], y[20:21], None), (x[21:], y[21:])]
    net, twin = network(), network()
    history = gpuback.fit(net, batches=batches, epochs=2)
    step = gpuback.TrainStep(twin, Adam())
    losses = [[float(step(*batch)) for batch in batches] for _ in range(2)]
    assert net.theta.tobytes() == twin.theta.tobytes()
    sizes = [3, 17, 1, 19]
    assert history.loss == pytest.approx([np.average(epoch, weights=sizes) for epoch in losses], rel=1e-6)


def test_batches_may_come_in_the_same_arrays_again_and_again() -> None:
    """What is trained on is a copy: the iterable is two ahead and may have written over its arrays."""
    x, y = data(80)
    mine = np.empty((SIZE, 4), np.float32), np.empty(SIZE, np.int64)

    def reusing(epoch: int) -> Iterator[Any]:
        for batch in parts(x, y):
            for target, source in zip(mine, batch, strict=True):
                target[...] = source
            yield mine

    assert train(network(), batches=reusing) == train(network(), batches=parts(x, y))


def test_batches_are_at_most_two_ahead() -> None:
    read, ahead = itertools.count(), []
    taken = [0]

    class Watching(Adam):
        def _step_if_finite(self, *arguments: Any, **options: Any) -> None:
            time.sleep(0.002)  # time to read on
            ahead.append(taken[0] - self.step_count - 1)
            super()._step_if_finite(*arguments, **options)

    def batches(epoch: int) -> Iterator[Any]:
        for batch in parts(*data(160)):
            taken[0] = next(read) + 1
            yield batch

    gpuback.fit(network(), batches=batches, optimizer=Watching(), epochs=2)
    assert max(ahead) == 2


# --- schedules, history, progress


def growing(epoch: int) -> list[Any]:
    """One batch more each epoch."""
    return parts(*data())[: epoch + 1]


def test_schedules_count_steps_over_epochs_of_different_lengths(tmp_path: Path) -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 / (1 + step)

    run = {"schedule": schedule, "checkpoint": tmp_path / "run.safetensors", "resume": True}
    history = gpuback.fit(network(), batches=growing, epochs=3, **run)
    history = gpuback.fit(network(seed=9), batches=growing, epochs=4, **run)
    assert asked == list(range(1 + 2 + 3 + 4))
    assert history.learning_rate == [0.1 / (1 + last) for last in (0, 2, 5, 9)]
    assert history.steps == 10


def test_schedules_count_steps_that_a_loss_scale_left_out(tmp_path: Path) -> None:
    asked: list[int] = []
    x, y = data()
    run = {
        "loss_scaling": LossScaling(2.0**24),
        "schedule": lambda step: asked.append(step) or 0.01,
        "checkpoint": tmp_path / "run.safetensors",
    }
    batches = parts(x * np.float32(100), y)
    history = gpuback.fit(network(dtype="float16"), batches=batches, epochs=2, **run)
    history = gpuback.fit(network(dtype="float16"), batches=batches, epochs=3, resume=True, **run)
    assert history.steps < len(asked) == 15
    assert asked == list(range(15))


@pytest.mark.parametrize("batches", [growing, parts(*data())], ids=["unknown", "known"])
def test_the_progress_bar_has_a_total_where_it_is_known(batches: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    gpuback.fit(network(), batches=batches, epochs=2, progress=True)
    shown = capsys.readouterr().err
    assert ("3/?" if callable(batches) else "10/10") in shown


def test_callbacks_run_between_epochs_whose_batches_are_read_after_them() -> None:
    events: list[Any] = []

    def batches(epoch: int) -> list[Any]:
        events.append(epoch)
        return parts(*data())

    def callback(net: MLP, history: History) -> bool:
        events.append("callback")
        return history.epochs == 2

    history = gpuback.fit(network(), batches=batches, epochs=9, callbacks=[callback])
    assert events == [0, "callback", 1, "callback"]
    assert history.stopped_early


# --- checkpoints


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 0)
    return tmp_path / "run.safetensors"


class InterruptionError(Exception):
    """Stands in for Ctrl-C, a full disk, a lost machine."""


@pytest.mark.parametrize("batches", [shuffled, parts(*data()), growing], ids=["a function", "a list", "varying steps"])
def test_a_resumed_stream_ends_in_the_same_bits(batches: Any, file: Path) -> None:
    run = {"schedule": cosine(0.05, steps=20), "validation": data(9), "epochs": 4}
    expected = train(network(), batches=batches, **run)
    for interrupted in (2, 3):

        def interrupt(net: MLP, history: History, epoch: int = interrupted) -> None:
            if history.epochs == epoch:
                raise InterruptionError

        with pytest.raises(InterruptionError):
            train(network(), batches=batches, checkpoint=file, resume=True, callbacks=[interrupt], **run)
    assert train(network(seed=3), batches=batches, checkpoint=file, resume=True, **run) == expected


def test_another_stream_or_arrays_are_refused_by_name(file: Path) -> None:
    x, y = data()
    gpuback.fit(network(), batches=parts(x, y), epochs=1, checkpoint=file)
    run: Any = {"epochs": 2, "checkpoint": file, "resume": True}
    with pytest.raises(OptionError, match="another run's: steps_per_epoch is None there and 3 here"):
        gpuback.fit(network(), batches=parts(x, y), steps_per_epoch=3, **run)
    with pytest.raises(OptionError, match="another run's: validation is"):
        gpuback.fit(network(), batches=parts(x, y), validation=(x, y), **run)
    with pytest.raises(OptionError, match="another run's: data is 'batches' there and '"):
        gpuback.fit(network(), x, y, **run)
    gpuback.fit(network(), x, y, epochs=1, checkpoint=file)
    with pytest.raises(OptionError, match="another run's: data is '.*' there and 'batches' here"):
        gpuback.fit(network(), batches=parts(x, y), **run)


def test_files_from_before_streams_resume_in_step(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not say how many batches there were."""
    from gpuback._core import persistence

    run: Any = {"batch_size": SIZE, "seed": 0, "schedule": cosine(0.05, steps=15), "checkpoint": file}
    expected = train(network(), *data(), **run)
    train(network(), *data(), **run | {"epochs": 2})
    arrays, metadata = persistence.read(file, kind="checkpoint")
    assert metadata.pop("batches") == 10
    persistence.write(file, dict(arrays), metadata, kind="checkpoint")
    assert train(network(), *data(), **run, resume=True) == expected


PROGRAM = """
import os, sys, time
import numpy as np
import gpuback
from gpuback._training import checkpoint
checkpoint.SECONDS_BETWEEN_WRITES = 0

def batches(epoch):
    rng = np.random.default_rng(epoch)
    for _ in range(3 + epoch % 3):
        time.sleep(float(sys.argv[2]))
        x = rng.standard_normal((20, 4), dtype=np.float32)
        yield x, (x[:, 0] > x[:, 1]).astype(int)

net = gpuback.MLP([4, 7, 2], seed=0, backend="numpy", reproducible=True)
schedule = gpuback.schedules.cosine(0.05, steps=50)
options = dict(epochs=12, schedule=schedule, checkpoint=sys.argv[1], resume=True)
history = gpuback.fit(net, batches=batches, optimizer=gpuback.Adam(), **options)
print(net.theta.tobytes().hex(), history.loss, history.learning_rate, history.steps)
"""


@pytest.mark.thorough
@pytest.mark.numpy_only
def test_a_killed_and_resumed_stream_ends_in_the_same_bits(tmp_path: Path) -> None:
    def command(name: str, pause: float) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(tmp_path / name), str(pause)]

    def output(name: str) -> str:
        return subprocess.run(command(name, 0), capture_output=True, text=True, check=True, timeout=60).stdout

    def written() -> int:
        return (tmp_path / "killed").stat().st_mtime_ns if (tmp_path / "killed").exists() else 0

    for rest in (0.0, 0.03, 0.06):  # where in the epoch after the one that is written
        before, deadline = written(), time.monotonic() + 60
        run = subprocess.Popen(command("killed", 0.03))
        while written() == before:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rest)
        run.kill()
        assert run.wait() == -signal.SIGKILL
    assert output("killed") == output("whole")


# --- errors


def streamed(batches: Any, net: MLP | None = None, **options: Any) -> History:
    return gpuback.fit(network() if net is None else net, batches=batches, **({"epochs": 2} | options))


def with_third(*batch: Any) -> list[Any]:
    return [*parts(*data())[:2], batch, *parts(*data())[3:]]


X, Y = (array[:5] for array in data())


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ((X[:, :3], Y), ShapeError, r"x: expected shape \(B, 4\)"),
        ((X[0], Y[0]), ShapeError, r"x: expected shape \(B, 4\).*; one sample is x\[None, :\]"),
        ((X, Y[:4]), ShapeError, "y: expected 5 labels, one per sample of x, got 4"),
        ((X[:0], Y[:0]), ShapeError, "x: expected at least one sample"),
        ((X, Y + 1.5), DtypeError, "y: expected integer labels"),
        ((X, Y + 7), LabelError, "y: expected labels 0 … 1"),
        ((X * 1j, Y), DtypeError, "x: expected real numbers"),
        ((X * np.inf, Y), DataError, "x: expected finite numbers .* in row 0"),
        ((X, Y, np.ones(4)), ShapeError, "sample_weight: expected shape"),
        ((X, Y, [1, 1, np.nan, 1, 1]), DataError, "sample_weight: expected finite numbers .* in row 2"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(batch: Any, error: type[Exception], message: str) -> None:
    net, twin = network(), network()
    with pytest.raises(error, match=f"^batch 2 of epoch 0: {message}"):
        streamed(with_third(*batch), net)
    gpuback.fit(twin, batches=with_third()[:2], epochs=1)
    assert net.theta.tobytes() == twin.theta.tobytes()  # the batches before it were trained on


@pytest.mark.parametrize("value, dtype", [(1e5, "float16"), (-1e5, "float16"), (np.nan, "bfloat16"), (1e39, "float32")])
def test_numbers_that_the_dtype_cannot_hold_are_named(value: float, dtype: str) -> None:
    x = X.astype(np.float64)
    x[3, 1] = value
    with pytest.raises(DataError, match=f"^batch 2 of epoch 0: x: .* that {dtype} can hold, .* in row 3$"):
        streamed(with_third(x, Y), network(dtype=dtype))


@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "item, came",
    [
        (X, r"ndarray of shape \(5, 4\)"),
        ((X,), "a tuple of 1"),
        ([X, Y, Y, Y], "a list of 4"),
        ("xy", "str"),
        ({"x": X, "y": Y}, "dict"),
        (None, "NoneType"),
    ],
    ids=["array", "one", "four", "text", "dict", "None"],
)
def test_what_is_no_batch_is_named(item: Any, came: str) -> None:
    expected = rf"^batch 1 of epoch 0: expected \(x, y\) or \(x, y, sample_weight\), got {came}$"
    with pytest.raises(DataError, match=expected):
        streamed([(X, Y), item])


def test_the_epoch_is_named_too() -> None:
    with pytest.raises(ShapeError, match="^batch 0 of epoch 1: x: "):
        streamed(lambda epoch: [(X[:, epoch:], Y)])


def test_what_the_iterable_raises_comes_out_unchanged() -> None:
    error = OSError("disk")

    def broken(epoch: int) -> Iterator[Any]:
        yield X, Y
        raise error

    for batches in (broken, lambda epoch: 1 / epoch):
        expected = OSError if batches is broken else ZeroDivisionError
        with pytest.raises(expected) as caught:
            streamed(batches)
        assert caught.value is error or batches is not broken
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-1] in ("broken", "<lambda>") and "fit" in frames


@pytest.mark.numpy_only
@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, KeyboardInterrupt])
def test_what_is_no_exception_comes_out_too(kind: type[BaseException]) -> None:
    def leaving(epoch: int) -> Iterator[Any]:
        yield X, Y
        raise kind

    with pytest.raises(kind):
        streamed(leaving)


def test_an_epoch_without_batches_is_refused() -> None:
    with pytest.raises(DataError, match="^epoch 0: expected at least one batch, got none$"):
        streamed([])
    once = iter([(X, Y)])
    with pytest.raises(DataError, match="^epoch 1: expected .* got none; an iterator that is used up"):
        streamed(lambda epoch: once)


@pytest.mark.parametrize("make", [lambda: iter([(X, Y)] * 5), lambda: [(X, Y)] * 2], ids=["iterator", "list"])
def test_too_few_batches_are_refused(make: Callable[[], Any]) -> None:
    given = make()
    epoch, came = (0, 2) if isinstance(given, list) else (1, 2)
    with pytest.raises(DataError, match=f"^epoch {epoch}: expected steps_per_epoch=3 batches, got {came}$"):
        streamed(given, steps_per_epoch=3)


@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "options, message",
    [
        ({"x": X, "y": Y}, "x: expected none with batches="),
        ({"y": Y}, "y: expected none with batches="),
        ({"sample_weight": np.ones(5)}, "sample_weight: expected none"),
        ({"batch_size": 5}, "batch_size: expected none"),
        ({"batch_size": None}, "batch_size: expected none"),
        ({"shuffle": True}, "shuffle: expected none"),
        ({"seed": 0}, "seed: expected none"),
        ({"validation": 0.2}, r"validation: expected \(x, y\), since nothing can be held out of batches=, got float"),
        ({"validation": (X[:, :2], Y)}, "validation x: expected shape"),
        ({"steps_per_epoch": 0}, "steps_per_epoch: expected an integer ≥ 1 or None, got 0"),
        ({"steps_per_epoch": 1.5}, "steps_per_epoch: expected an integer"),
        ({"batches": 7}, "batches: expected an iterable of .*, or a function from an epoch's number to one, got int"),
        ({"batches": lambda epoch: 7}, r"batches\(0\): expected an iterable of batches, got int"),
        ({"batches": iter([])}, "batches: an iterator can be gone through once, which makes one of 2 epochs"),
        (
            {"batches": iter([]), "steps_per_epoch": 1, "checkpoint": "run", "resume": True},
            "batches: an iterator does not tell where an earlier run had come to",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_options_that_do_not_go_together_are_named(
    options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = network()
    error = ShapeError if message.startswith("validation x") else OptionError
    with pytest.raises(error, match=f"^{message}"):
        gpuback.fit(net, **({"batches": [(X, Y)], "epochs": 2} | options))
    assert net.theta.tobytes() == network().theta.tobytes()


def test_shuffle_false_says_what_is_so() -> None:
    assert streamed([(X, Y)], shuffle=False).steps == 2


@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "expected x and y, or batches=, got no x and no y"),
        ({"x": X}, "expected x and y, or batches=, got no y"),
        ({"x": X, "y": Y, "steps_per_epoch": 3}, "steps_per_epoch: expected batches= with it, got 3 without"),
    ],
    ids=["nothing", "x alone", "steps_per_epoch"],
)
def test_arrays_need_both(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        gpuback.fit(network(), **options)


# --- the thread


class Watched:
    """Batches without end that note when they are closed, and on which thread."""

    def __init__(self, y: np.ndarray = Y) -> None:
        self.y = y
        self.closed: list[str] = []
        self.threads: set[str] = set()

    def __call__(self, epoch: int) -> Iterator[Any]:
        try:
            while True:
                self.threads.add(threading.current_thread().name)
                yield X, self.y
        finally:
            self.closed.append(threading.current_thread().name)


def stop(net: MLP, history: History) -> bool:
    return True


def raise_interrupt(net: MLP, history: History) -> None:
    raise KeyboardInterrupt


class Interrupted(Adam):
    def _step_if_finite(self, *arguments: Any, **options: Any) -> None:
        if self.step_count == 4:
            raise KeyboardInterrupt
        super()._step_if_finite(*arguments, **options)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"steps_per_epoch": 3, "epochs": 2}, None),
        ({"steps_per_epoch": 3, "epochs": 9, "callbacks": [stop]}, None),
        ({"steps_per_epoch": 3, "callbacks": [raise_interrupt]}, KeyboardInterrupt),
        ({"make_optimizer": Interrupted}, KeyboardInterrupt),
        ({"make_optimizer": lambda: SGD(1e30)}, DivergedError),
        (
            {
                "steps_per_epoch": 2,
                "epochs": 9,
                "patience": 1,
                "validation": (X, np.eye(2)[Y]),
                "make_optimizer": lambda: SGD(0.0),
            },
            None,
        ),
    ],
    ids=["steps", "callback", "interrupted callback", "interrupted step", "diverged", "patience"],
)
def test_a_generator_is_closed_and_the_thread_ended(options: Any, error: type[BaseException] | None) -> None:
    """By the fixture above no thread is left."""
    batches = Watched(np.eye(2)[Y])
    with contextlib.nullcontext() if error is None else pytest.raises(error) as caught:
        train(network(activation="identity", loss="squared_error"), batches=batches, **options)
    assert batches.threads == {"gpuback batches"}
    assert set(batches.closed) == {"gpuback batches"}
    assert caught is None or caught.type is error


def test_the_users_own_iterator_is_not_closed() -> None:
    batches = Watched()
    stream = batches(0)
    streamed(stream, steps_per_epoch=3)
    assert batches.closed == []
    next(stream)
    del stream
    gc.collect()
    assert len(batches.closed) == 1


def test_a_bad_batch_closes_its_generator() -> None:
    closed: list[bool] = []

    def batches(epoch: int) -> Iterator[Any]:
        try:
            yield X, Y
            yield X
            yield X, Y
        finally:
            closed.append(True)

    with pytest.raises(DataError, match="^batch 1 of epoch 0") as caught:
        streamed(batches)
    assert closed == [True] and caught.value.__traceback__ is not None  # although the traceback is there still


def test_one_thread_takes_all_batches_of_a_run() -> None:
    """What belongs to a thread, such as a connection of sqlite3, may live in an iterator over all epochs."""
    threads: set[int] = set()
    stream = (threads.add(threading.get_ident()) or (X, Y) for _ in itertools.count())
    streamed(stream, steps_per_epoch=2, epochs=4)
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_no_epoch_starts_no_thread() -> None:
    batches = Watched()
    assert streamed(batches, epochs=0) == History()
    assert batches.threads == set()


def test_the_iterable_sees_the_callers_settings() -> None:
    seen: list[Any] = []

    def batches(epoch: int) -> list[Any]:
        seen.append(np.geterr()["divide"])
        return [(X, Y)]

    with np.errstate(divide="raise"):
        streamed(batches, epochs=1)
    streamed(batches, epochs=1)
    assert seen == ["raise", np.geterr()["divide"]]


def test_waiting_for_slow_batches_can_be_interrupted() -> None:
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it

    def batches(epoch: int) -> Iterator[Any]:
        yield X, Y
        time.sleep(0.05)  # by now the step is over
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        yield X, Y

    try:
        with pytest.raises(KeyboardInterrupt):
            streamed(batches)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_function_that_raises_stop_iteration_has_given_no_batches() -> None:
    with pytest.raises(DataError, match=r"^batches\(0\): expected an iterable of batches, got StopIteration$"):
        streamed(lambda epoch: next(iter([])))


@pytest.mark.numpy_only
def test_reading_goes_on_beside_the_steps() -> None:
    """While a step runs, the next batch is being taken: neither could end without the other."""
    step_runs, batch_comes = threading.Event(), threading.Event()

    class Meeting(Adam):
        def _step_if_finite(self, *arguments: Any, **options: Any) -> None:
            step_runs.set()
            assert batch_comes.wait(timeout=20)
            super()._step_if_finite(*arguments, **options)

    def batches(epoch: int) -> Iterator[Any]:
        yield X, Y
        assert step_runs.wait(timeout=20)
        batch_comes.set()
        yield X, Y

    assert streamed(batches, epochs=1, optimizer=Meeting()).steps == 2
