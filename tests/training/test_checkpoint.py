"""A run that is interrupted, or killed, and resumed ends in the bits of one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, SGD, Adam, AdamW, CudaForms, DivergedError, History
from gpuback._core import activation_names, persistence
from gpuback._training import checkpoint
from gpuback.errors import FileFormatError, GpubackError, MissingFolderError, OptionError
from gpuback.schedules import constant, cosine, warmup

pytestmark = pytest.mark.on_each_backend

EPOCHS = 6


class InterruptionError(Exception):
    """Stands in for Ctrl-C, a full disk, a lost machine."""


@pytest.fixture(autouse=True)
def every_epoch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


def data(n: int = 41) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 4))
    return x.astype(np.float32), (x[:, 0] * x[:, 1] > 0).astype(int)


def network(**options: Any) -> MLP:
    return MLP([4, 7, 2], **({"activation": "tanh", "seed": 0} | options))


def stop_after(epoch: int) -> Callable[[MLP, History], None]:
    def interrupt(net: MLP, history: History) -> None:
        if history.epochs == epoch:
            raise InterruptionError

    return interrupt


def train(
    file: Path | None,
    make_optimizer: Callable[[], Any] = Adam,
    *,
    net: MLP | None = None,
    interrupt: int | None = None,
    epoch_rate: Callable[[int], float] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions: θ, the optimizer, the history (but for its clock)."""
    net = network() if net is None else net
    optimizer = make_optimizer()
    callbacks = []
    if epoch_rate is not None:

        def set_rate(net: MLP, history: History) -> None:
            optimizer.learning_rate = epoch_rate(history.epochs)

        callbacks.append(set_rate)
    if interrupt is not None:
        callbacks.append(stop_after(interrupt))
    options = {"epochs": EPOCHS, "batch_size": 8, "seed": 5, "callbacks": callbacks, "checkpoint": file} | options
    history = gpuback.fit(net, *data(), optimizer=optimizer, **options)
    state = {name: array.tobytes() for name, array in optimizer.state.items()}
    return net.theta.tobytes(), state, optimizer.step_count, optimizer._options(), replace(history, seconds=0.0)


RUNS = [
    pytest.param({"make_optimizer": Adam}, id="Adam"),
    pytest.param({"make_optimizer": lambda: AdamW(0.01, weight_decay=0.1)}, id="AdamW"),
    pytest.param({"make_optimizer": lambda: SGD(0.1)}, id="SGD"),
    pytest.param({"make_optimizer": lambda: SGD(0.1, momentum=0.9)}, id="momentum"),
    pytest.param({"make_optimizer": lambda: SGD(0.1, 0.9, True, 0.01), "clip_norm": 0.1}, id="Nesterov, clipped"),
    pytest.param({"batch_size": None}, id="full batches"),
    pytest.param({"shuffle": False}, id="not shuffled"),
    pytest.param({"validation": 0.3}, id="validation"),
    pytest.param({"make_optimizer": lambda: Adam(0.5), "validation": 0.3, "patience": 9}, id="best θ at the end"),
    pytest.param({"make_optimizer": lambda: Adam(0.5), "validation": 0.3, "patience": 2}, id="early stopping"),
    pytest.param({"epoch_rate": lambda epoch: 0.1 * 0.5**epoch}, id="a learning rate per epoch"),
    pytest.param(
        {"make_optimizer": lambda: SGD(0.1, 0.9), "epoch_rate": lambda epoch: 0.1 / (1 + epoch)}, id="momentum, rates"
    ),
    pytest.param({"schedule": warmup(cosine(0.05, steps=20), steps=5)}, id="a schedule by steps"),
    pytest.param({"schedule": lambda step: 0.1 / (1 + step)}, id="a function of the step"),
]


# --- interrupted and resumed


@pytest.mark.thorough(first=3)
@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_ends_in_the_same_bits(run: Any, file: Path) -> None:
    expected = train(None, **run)
    epochs = expected[-1].epochs
    for interrupt in range(1, epochs + 1):
        file.unlink(missing_ok=True)
        with pytest.raises(InterruptionError):
            train(file, **run, interrupt=interrupt)
        assert file.exists() == (interrupt > 1)  # the interrupted epoch itself is not in the file
        assert train(file, **run, resume=True) == expected


def test_the_cases_above_try_what_they_say() -> None:
    early = train(None, lambda: Adam(0.5), validation=0.3, patience=2)[-1]
    late = train(None, lambda: Adam(0.5), validation=0.3, patience=9)[-1]
    assert early.stopped_early and 0 < early.best_epoch < early.epochs - 1 < EPOCHS - 1
    assert not late.stopped_early and late.best_epoch < EPOCHS - 1


@pytest.mark.parametrize("precision", [{"dtype": "float64"}, {"dtype": "bfloat16"}, {"allow_tf32": True}], ids=str)
def test_in_other_precisions_too(precision: Any, file: Path) -> None:
    expected = train(None, net=network(**precision))
    with pytest.raises(InterruptionError):
        train(file, net=network(**precision), interrupt=3)
    assert train(file, net=network(**precision, seed=99), resume=True) == expected


def test_a_run_may_be_interrupted_again_and_again(file: Path) -> None:
    run = {"make_optimizer": lambda: Adam(0.5), "validation": 0.3, "patience": 9}
    for interrupt in range(1, EPOCHS + 1):
        with pytest.raises(InterruptionError):
            train(file, **run, resume=True, interrupt=interrupt)
    assert train(file, **run, resume=True) == train(None, **run)


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 7, 20, 35])
def test_an_interruption_within_an_epoch_loses_the_epoch(steps: int, file: Path) -> None:
    class Faulty(Adam):
        def _step_if_finite(self, *arguments: Any, **options: Any) -> None:
            if self.step_count == steps:
                raise InterruptionError
            super()._step_if_finite(*arguments, **options)

    Faulty.__name__ = "Adam"
    with pytest.raises(InterruptionError):
        train(file, Faulty)
    assert file.exists() == (steps >= 6)
    assert train(file, resume=True) == train(None)


def test_the_same_objects_may_go_on(file: Path) -> None:
    """In a notebook: Ctrl-C, then the same cell with resume=True."""
    net, optimizer = network(), SGD(0.1, momentum=0.9)
    with pytest.raises(InterruptionError):
        train(file, lambda: optimizer, net=net, interrupt=3)
    assert train(file, lambda: optimizer, net=net, resume=True) == train(None, lambda: SGD(0.1, momentum=0.9))


def test_the_networks_own_theta_and_seed_give_way_to_the_files(file: Path) -> None:
    with pytest.raises(InterruptionError):
        train(file, interrupt=3)
    assert train(file, net=network(seed=77), resume=True) == train(None)


def test_a_run_without_a_seed_is_resumed_in_its_own_order(file: Path) -> None:
    thetas = {}
    for epochs, resume in ((2, False), (EPOCHS, True)):
        thetas[epochs] = train(file, seed=None, epochs=epochs, resume=resume)[0]
        shutil.copy(file, file.with_suffix(f".{epochs}"))
    again = train(file.with_suffix(".2"), seed=None, resume=True)[0]
    assert again == thetas[EPOCHS] != train(None, seed=None)[0]


@pytest.mark.parametrize(
    "make_optimizer, change",
    [
        (lambda: SGD(0.1), {"momentum": 0.9}),
        (lambda: SGD(0.1, 0.9), {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}),
        (lambda: SGD(0.1, 0.9, nesterov=True), {"nesterov": False, "momentum": 0.0}),
        (lambda: SGD(0.1), {"momentum": [0.9, 0.0, 0.5]}),  # one epoch after the other
        (lambda: Adam(0.1), {"betas": (0.5, 0.9), "eps": 1e-3}),
        (lambda: AdamW(0.1), {"weight_decay": 0.5}),
    ],
)
@pytest.mark.parametrize("interrupt", [pytest.param(2, marks=pytest.mark.thorough), 4])
def test_hyper_parameters_that_a_callback_sets_are_restored(
    make_optimizer: Any, change: dict[str, Any], interrupt: int, file: Path
) -> None:
    def run(interrupt: int | None = None, **options: Any) -> tuple[Any, ...]:
        optimizer = make_optimizer()

        def set_them(net: MLP, history: History) -> None:
            epoch = history.epochs - 2
            for name, value in change.items():
                if isinstance(value, list) and 0 <= epoch < len(value):
                    setattr(optimizer, name, value[epoch])
                elif epoch == 0:
                    setattr(optimizer, name, value)

        callbacks = [set_them, *([] if interrupt is None else [stop_after(interrupt)])]
        return train(make_optimizer=lambda: optimizer, callbacks=callbacks, **options)

    with pytest.raises(InterruptionError):
        run(interrupt, file=file)
    assert run(file=file, resume=True) == run(file=None)


def test_a_checkpoint_of_before_hyper_parameters_were_kept_is_resumed(file: Path) -> None:
    train(file, epochs=2)
    arrays, metadata = persistence.read(file, kind="checkpoint")
    for name in ("betas", "eps", "weight_decay", "beta_powers"):
        del metadata[name]
    persistence.write(file, arrays, metadata, kind="checkpoint")
    assert train(file, resume=True) == train(None)


def test_nesterov_stays_on_if_the_checkpoint_does_not_say(file: Path) -> None:
    make = lambda: SGD(0.1, momentum=0.9, nesterov=True)  # noqa: E731
    train(file, make, epochs=2)
    arrays, metadata = persistence.read(file, kind="checkpoint")
    for name in ("momentum", "nesterov", "weight_decay", "beta_powers"):
        del metadata[name]
    persistence.write(file, arrays, metadata, kind="checkpoint")
    assert train(file, make, resume=True) == train(None, make)


@pytest.mark.parametrize("run", RUNS)
def test_a_finished_run_resumed_with_more_epochs_goes_on(run: Any, file: Path) -> None:
    expected = train(None, **run)
    train(file, **run, epochs=2)
    assert train(file, **run, resume=True) == expected


def test_a_finished_run_resumed_is_finished(file: Path) -> None:
    called: list[int] = []
    for run in ({}, {"make_optimizer": lambda: Adam(0.5), "validation": 0.3, "patience": 2}):
        finished = train(file, **run)
        content = file.read_bytes()
        resumed = train(file, **run, net=network(seed=4), resume=True, callbacks=[lambda *_: called.append(1)])
        assert resumed == finished
        assert file.read_bytes() == content
    assert called == []


def test_fewer_epochs_than_are_done_change_nothing(file: Path) -> None:
    finished = train(file)
    assert train(file, resume=True, epochs=2) == finished


def test_a_missing_file_starts_anew(file: Path) -> None:
    assert train(file, resume=True) == train(None)
    assert file.exists()


def test_without_resume_an_old_file_is_replaced(file: Path) -> None:
    train(file, lambda: Adam(0.7), batch_size=3)
    assert train(file) == train(None)
    assert train(file, resume=True) == train(None)


def test_a_diverging_run_resumed_diverges_at_the_same_step(file: Path) -> None:
    errors = []
    for resume in (False, True):
        with pytest.raises(DivergedError) as caught:
            train(
                file,
                lambda: SGD(0.1),
                epoch_rate=lambda epoch: 1e8**epoch,
                net=network(activation="identity"),
                resume=resume,
            )
        errors.append((caught.value.step, caught.value.epoch))
    assert errors[0] == errors[1]
    assert errors[0][1] > 0


def test_a_checkpoint_changes_nothing(file: Path) -> None:
    assert train(file) == train(None) == train(str(file))


# --- when it is written


def test_it_is_written_at_most_once_in_so_many_seconds_and_at_the_end(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = persistence.write

    def counting(path: Any, arrays: Any, metadata: Any, *, kind: str) -> None:
        written.append(len(arrays["loss"]))
        write(path, arrays, metadata, kind=kind)

    monkeypatch.setattr(persistence, "write", counting)
    train(file)
    assert written == [1, 2, 3, 4, 5, 6]
    for rare in ({}, {"make_optimizer": lambda: Adam(0.5), "validation": 0.3, "patience": 2}):
        written.clear()
        monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 1e9)
        last = train(file, **rare)[-1].epochs
        assert written == [1, last]


def test_rare_writes_lose_epochs_and_no_bits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", 1e9)
    with pytest.raises(InterruptionError):
        train(file, interrupt=5)
    assert train(file, resume=True) == train(None)


def test_nothing_is_left_beside_it(file: Path) -> None:
    with pytest.raises(InterruptionError):
        train(file, interrupt=3)
    train(file, resume=True)
    assert os.listdir(file.parent) == [file.name]


def test_a_write_that_fails_leaves_the_earlier_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InterruptionError):
        train(file, interrupt=3)
    content = file.read_bytes()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "replace", full_disk)
        train(file, resume=True)
    assert file.read_bytes() == content
    assert os.listdir(file.parent) == [file.name]
    assert train(file, resume=True) == train(None)


# --- another run's file, and damaged ones


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"make_optimizer": lambda: Adam(0.002)}, "learning_rate is 0.001 there and 0.002 here"),
        ({"make_optimizer": lambda: Adam(betas=(0.8, 0.999))}, "betas is"),
        ({"make_optimizer": lambda: Adam(eps=1e-7)}, "eps is"),
        ({"make_optimizer": lambda: Adam(weight_decay=0.1)}, "weight_decay is"),
        ({"make_optimizer": AdamW}, "optimizer is 'Adam' there and 'AdamW' here"),
        ({"make_optimizer": lambda: Adam(decay_biases=False)}, "decay_biases is the default there and False here"),
        ({"make_optimizer": lambda: SGD(1e-3)}, "optimizer is"),
        ({"batch_size": 9}, "batch_size is 8 there and 9 here"),
        ({"batch_size": None}, "batch_size is 8 there and None here"),
        ({"shuffle": False}, "shuffle is True there and False here"),
        ({"clip_norm": 1.0}, "clip_norm is None there and 1.0 here"),
        ({"make_net": lambda: MLP([4, 8, 2])}, "architecture is"),
        ({"make_net": lambda: network(activation="relu")}, "architecture is"),
        ({"make_net": lambda: network(dtype="float64")}, "architecture is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_runs_file_is_refused_by_name(changed: Any, named: str, file: Path) -> None:
    train(file, epochs=2)
    content = file.read_bytes()
    options = {"make_net": lambda: network(seed=3)} | changed
    net = options.pop("make_net")()
    before = net.theta.tobytes()
    with pytest.raises(OptionError, match=rf"{file.name} is another run's: {named}"):
        train(file, **options, net=net, resume=True)
    assert net.theta.tobytes() == before
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "there, here, named",
    [
        ({"make_optimizer": lambda: SGD(0.1, 0.9)}, {"make_optimizer": lambda: SGD(0.1, 0.8)}, "momentum"),
        ({"make_optimizer": lambda: SGD(0.1, 0.9)}, {"make_optimizer": lambda: SGD(0.1, 0.9, True)}, "nesterov"),
    ],
    ids=["momentum", "nesterov"],
)
def test_another_kind_of_momentum_is_refused_by_name(there: Any, here: Any, named: str, file: Path) -> None:
    train(file, **there, epochs=2)
    with pytest.raises(OptionError, match=f"another run's: {named} is"):
        train(file, **here, resume=True)


@pytest.mark.parametrize(
    "there, here, named",
    [
        ({"validation": 0.2}, {"validation": 0.5}, "validation"),
        ({}, {"validation": 0.3}, "validation"),
        ({"validation": 0.3, "patience": 9}, {}, "validation"),
        ({"validation": data(5)}, {"validation": data(6)}, "validation"),
        ({"seed": 5}, {"seed": 6}, "seed"),
        ({"seed": 5}, {"seed": None}, "seed"),
        ({}, {"sample_weight": np.full(41, 2.0)}, "data"),
        ({"schedule": cosine(0.1, 20)}, {"schedule": cosine(0.1, 30)}, "schedule"),
        ({}, {"schedule": constant(0.1)}, "schedule"),
        ({"schedule": lambda step: 0.1}, {}, "schedule"),
    ],
    ids=[
        *("another fraction", "none before", "none now", "other validation data", "seed", "no seed", "weights"),
        *("another schedule", "no schedule before", "no schedule now"),
    ],
)
def test_another_split_or_seed_is_refused_by_name(there: Any, here: Any, named: str, file: Path) -> None:
    train(file, **there, epochs=2)
    with pytest.raises(OptionError, match=f"another run's: {named} is"):
        train(file, **here, resume=True)


@pytest.mark.numpy_only
def test_another_registered_activation_of_the_same_name_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def register(power: int, forms: bool = True) -> None:
        monkeypatch.setattr(activation_names, "REGISTERED", table := {})
        monkeypatch.setattr("gpuback._core.own_activations.REGISTERED", table)
        x = " * x" * (power - 1)
        gpuback.register_activation(
            "test_power",
            forward=lambda a: a**power,
            slope=lambda a: power * a ** (power - 1),
            cuda=CudaForms(f"x{x}", f"{power}{x}") if forms else None,
        )

    def identity() -> dict[str, Any]:
        return persistence.read(file, kind="checkpoint")[1]["run"]

    register(2)
    train(file, net=network(activation="test_power"), epochs=2)
    assert identity()["registered_activations"] == {"test_power": ["x * x", "2 * x"]}
    register(3)
    with pytest.raises(OptionError, match="another run's: registered_activations is .*2 .* there and .*3 .* here"):
        train(file, net=network(activation="test_power"), resume=True)
    register(2)
    train(file, net=network(activation="test_power"), resume=True)
    register(2, forms=False)
    for activation in ("test_power", "softplus(beta=2)", "tanh"):
        file.unlink()
        train(file, net=network(activation=activation), epochs=1)
        assert "registered_activations" not in identity()


def test_other_data_are_refused(file: Path) -> None:
    x, y = data()
    options = {"batch_size": 8, "seed": 5, "checkpoint": file}
    gpuback.fit(network(), x, y, epochs=2, **options)
    for others in ((x[:40], y[:40]), (x, 1 - y), (x + 1, y)):
        with pytest.raises(OptionError, match="another run's: data is"):
            gpuback.fit(network(), *others, resume=True, **options)
    gpuback.fit(network(), x.tolist(), y.astype(np.int8), resume=True, **options)  # the same in another form


@pytest.mark.parametrize("before, after", [(None, 9), (9, None)])
def test_patience_may_be_changed_on_resuming(before: int | None, after: int | None, file: Path) -> None:
    """Here the best epoch comes before the interruption; with patience θ ends as it was then, without as it is last."""
    run = {"make_optimizer": lambda: Adam(0.5), "validation": 0.3}
    best = train(None, **run)[-1].best_epoch
    train(file, **run, patience=before, epochs=best + 2)
    assert train(file, **run, patience=after, resume=True) == train(None, **run, patience=after)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": np.int64(8)}, {"clip_norm": np.float32(1.0)}, {"seed": np.int64(5)}],
    ids=["batch_size", "clip_norm", "seed"],
)
def test_options_may_be_numpy_numbers(options: Any, file: Path) -> None:
    train(file, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_schedule_may_yield_numpy_numbers(dtype: Any, file: Path) -> None:
    run = {"epoch_rate": lambda epoch: dtype(0.1 * 0.9**epoch)}
    with pytest.raises(InterruptionError):
        train(file, **run, interrupt=3)
    assert train(file, **run, resume=True) == train(None, **run)


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut short": content[:-1],
        "half": content[:middle],
        "longer": content + b"\0",
        "one bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "zeros": bytes(len(content)),
        "text": b"epoch,loss\n1,0.5\n",
    }


@pytest.mark.parametrize("damage", list(damaged(b"0123456789")))
def test_a_damaged_file_is_refused(damage: str, file: Path) -> None:
    train(file, epochs=2)
    file.write_bytes(damaged(file.read_bytes())[damage])
    content = file.read_bytes()
    net = network(seed=3)
    before = net.theta.tobytes()
    with pytest.raises(FileFormatError, match=file.name):
        train(file, net=net, resume=True)
    assert net.theta.tobytes() == before
    assert file.read_bytes() == content


def test_a_model_file_is_no_checkpoint(file: Path) -> None:
    network().save(file)
    with pytest.raises(FileFormatError, match="expected a gpuback checkpoint, found a gpuback model"):
        train(file, resume=True)


def test_the_network_of_a_checkpoint_can_be_loaded(file: Path) -> None:
    net = network()
    train(file, epochs=2, net=net)
    loaded = MLP.load(file, backend="numpy")
    assert loaded.architecture == net.architecture
    assert loaded.theta.tobytes() == net.ops.to_numpy(net.theta).tobytes()


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(MissingFolderError, match="there is no folder") as caught:
        train(tmp_path / "nowhere" / "run")
    assert isinstance(caught.value, GpubackError)


def test_a_folder_that_does_not_exist_is_found_before_training(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(MissingFolderError):
        train(tmp_path / "nowhere" / "run", net=net)
    assert net.theta.tobytes() == network().theta.tobytes()


# --- killed

KILLS = int(os.environ.get("GPUBACK_TEST_KILLS", "4"))
CHILD = """
import itertools, sys, time
import numpy as np
import gpuback, gpuback._training.checkpoint

gpuback._training.checkpoint.SECONDS_BETWEEN_WRITES = 0
file, epochs, most_in_this_life = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
x, y = rng.standard_normal((60, 5)), rng.integers(3, size=60)
net = gpuback.MLP([5, 400, 3], seed=0)
so_far = itertools.count(1)

def tell(net, history):
    print(history.epochs, flush=True)
    if next(so_far) == most_in_this_life:
        time.sleep(600)  # whoever is to kill this process is late

history = gpuback.fit(
    net, x, y, epochs=epochs, batch_size=16, seed=1, validation=0.2, patience=epochs,
    optimizer=gpuback.Adam(0.003), checkpoint=file, resume=True,
    callbacks=[tell],
)
print("done", net.theta.tobytes().hex(), history.loss, history.validation_loss, history.best_epoch, history.steps)
"""


def child(file: Path, epochs: int, most_in_this_life: int = 0) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(gpuback.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), str(epochs), str(most_in_this_life)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def last_line(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0
    return output.splitlines()[-1]


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.numpy_only
def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Killed as nothing can prepare for, now while it trains, now while it writes the file or renames it."""
    epochs = 20 * KILLS + 10
    whole = child(tmp_path / "whole", epochs)
    folder = tmp_path / "killed"
    folder.mkdir()
    file, seed = folder / "run", random.randrange(2**32)
    print(f"random.Random({seed})")  # pytest shows it if the test fails
    moments, reached = random.Random(seed), [0]
    for _ in range(KILLS):
        with child(file, epochs, most_in_this_life=20) as process:
            reached.extend(int(process.stdout.readline()) for _ in range(moments.randint(1, 12)))
            time.sleep(moments.uniform(0, 0.005))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        if file.exists():
            persistence.read(file, kind="checkpoint")  # whole, whatever happened
    finished = last_line(child(file, epochs))
    assert finished.startswith("done")
    assert finished == last_line(whole)
    # A file that was being written when its writer was killed stays; it has a name that nothing reads.
    beside = [name for name in os.listdir(folder) if name != file.name]
    assert all(name.startswith(".gpuback-") and name.endswith(".tmp") for name in beside)
    print(f"{KILLS} kills, {max(reached)} of {epochs} epochs before the last, {len(beside)} unfinished files")


def test_what_a_killed_run_left_beside_its_file_confuses_nobody(file: Path) -> None:
    with pytest.raises(InterruptionError):
        train(file, interrupt=3)
    litter = file.with_name(f".gpuback-{os.getpid()}-0123456789abcdef.tmp")
    litter.write_bytes(file.read_bytes()[:100])
    assert train(file, resume=True) == train(None)
    file.unlink()
    assert train(file, resume=True) == train(None)
    assert litter.stat().st_size == 100


def test_a_path_that_is_a_folder(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        train(tmp_path, net=net)
    assert net.theta.tobytes() == network().theta.tobytes()


def test_a_schedule_may_go_on_with_the_same_optimizer(file: Path) -> None:
    """As in a notebook after Ctrl-C: the learning rate that the schedule has reached is no other run's."""
    x, y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) % 2
    net, optimizer = MLP([3, 4, 2], seed=0), SGD(0.1)

    def halve(net: MLP, history: History) -> None:
        optimizer.learning_rate /= 2

    options = {"optimizer": optimizer, "seed": 1, "checkpoint": file, "callbacks": [halve]}
    gpuback.fit(net, x, y, epochs=2, **options)
    assert gpuback.fit(net, x, y, epochs=3, resume=True, **options).epochs == 3


def test_a_run_that_lost_patience_goes_on_with_more(file: Path) -> None:
    run = {"make_optimizer": lambda: Adam(0.5), "validation": 0.3}
    stopped = train(file, **run, patience=1)[-1]
    assert stopped.stopped_early
    assert train(file, **run, patience=1, resume=True)[-1].epochs == stopped.epochs
    assert train(file, **run, patience=9, resume=True)[-1].epochs > stopped.epochs


def test_a_run_that_a_callback_stopped_goes_on(file: Path) -> None:
    """And the callback is asked again; the result is that of a run that was never stopped."""

    def stop(net: MLP, history: History) -> bool:
        return history.epochs == 2

    whole = train(None)[0]
    assert train(file, callbacks=[stop])[-1].epochs == 2
    resumed, *_, history = train(file, resume=True, callbacks=[stop])
    assert history.epochs == EPOCHS and not history.stopped_early
    assert resumed == whole


def test_a_method_of_an_array_may_be_the_schedule(file: Path) -> None:
    rates = np.full(100, 0.1)
    x, y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) % 2
    for epochs in (1, 2):
        net = MLP([3, 4, 2], seed=0)
        options = {"schedule": rates.__getitem__, "seed": 1, "checkpoint": file, "resume": True}
        assert gpuback.fit(net, x, y, epochs=epochs, **options).epochs == epochs


def test_an_incomplete_file_changes_nothing(file: Path) -> None:
    x, y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) % 2
    net, optimizer = MLP([3, 4, 2], seed=0), Adam(0.1)
    gpuback.fit(net, x, y, optimizer=optimizer, epochs=1, seed=1, checkpoint=file)
    arrays, metadata = persistence.read(file, kind="checkpoint")
    del arrays["learning_rate"]
    persistence.write(file, arrays, metadata, kind="checkpoint")
    net, optimizer = MLP([3, 4, 2], seed=5), Adam(0.1)
    before = net.theta.tobytes()
    with pytest.raises(FileFormatError, match="without 'learning_rate'"):
        gpuback.fit(net, x, y, optimizer=optimizer, epochs=2, seed=1, checkpoint=file, resume=True)
    assert (net.theta.tobytes(), optimizer.step_count) == (before, 0)


# --- forged: the hash fits, the content does not

ODD = (None, -1, 1.5, "x", [], {}, True, float("nan"), float("inf"), 10**12, 2**70, [1], {"a": 1})
FIELDS = (
    *("run", "seed", "step_count", "learning_rate", "best_epoch", "steps", "batches", "loss_scale"),
    *("betas", "eps", "weight_decay", "beta_powers"),
)
RATES = (1.5, 10**12, 2**70)


def forged_run(file: Path, resume: bool, **changes: Any) -> tuple[MLP, Adam]:
    """Train, or resume what was changed; a file that is refused must change neither network nor optimizer."""
    rng = np.random.default_rng(0)
    net, optimizer = MLP([3, 4, 2], seed=0), Adam(0.1)
    before = net.theta.tobytes()
    try:
        options = {"epochs": 2 if resume else 1, "seed": 1, "validation": 0.2, "checkpoint": file, "resume": resume}
        gpuback.fit(net, rng.standard_normal((20, 3)), np.arange(20) % 2, optimizer=optimizer, **options)
    except GpubackError:
        assert (net.theta.tobytes(), optimizer.step_count) == (before, 0)
        raise
    return net, optimizer


def forge(file: Path, arrays: dict[str, Any] | None = None, **metadata: Any) -> None:
    kept, described = persistence.read(file, kind="checkpoint")
    persistence.write(file, kept | (arrays or {}), described | metadata, kind="checkpoint")


@pytest.mark.thorough(first=2)
@pytest.mark.numpy_only
@pytest.mark.parametrize("field", FIELDS)
def test_a_forged_field_is_refused_by_name(file: Path, field: str) -> None:
    forged_run(file, resume=False)
    sound = file.read_bytes()
    assert set(FIELDS) == set(persistence.read(file, kind="checkpoint")[1])
    harmless = {"loss_scale": (None,), "beta_powers": (None,), "batches": (10**12,), "eps": RATES}.get(field, ())
    if field in ("learning_rate", "weight_decay"):
        harmless = RATES
    if field == "step_count":
        harmless = (10**12,)  # steps made before this run are none of its business
    for value in ODD:
        file.write_bytes(sound)
        forge(file, **{field: value})
        if value in harmless and not isinstance(value, bool):
            forged_run(file, resume=True)
            continue
        error = OptionError if (field, value) in (("run", {}), ("run", {"a": 1})) else FileFormatError
        with pytest.raises(error, match=f"{file.name}.*{'another run' if error is OptionError else field}"):
            forged_run(file, resume=True)


@pytest.mark.thorough
@pytest.mark.numpy_only
def test_a_forged_array_is_refused_by_name(file: Path) -> None:
    forged_run(file, resume=False)
    sound = file.read_bytes()
    names = set(persistence.read(file, kind="checkpoint")[0])
    assert {"theta", "best_theta", "optimizer.first_moment", "validation_loss"} < names
    for name in names:
        array = persistence.read(file, kind="checkpoint")[0][name]
        others = (np.zeros(0), np.zeros((1, 1)), np.array(1.0), array.reshape(1, -1), array.astype(int), array[:1] > 0)
        for value in (*others, np.zeros(len(array) + 1), array.astype(np.float16)):
            if name == "validation_loss" and value.shape == (0,):
                continue  # a run without validation, which has no best_epoch
            forge(file, {name: value})
            with pytest.raises(FileFormatError, match=file.name):
                forged_run(file, resume=True)
            file.write_bytes(sound)
    for name in ("optimizer.velocity", "more"):
        forge(file, {name: np.zeros(3)})
        with pytest.raises(FileFormatError, match=f"got one with an array '{name}'"):
            forged_run(file, resume=True)
        file.write_bytes(sound)
    forge(file, {"validation_loss": np.zeros(0)})
    with pytest.raises(FileFormatError, match="best_epoch: expected None, as there is no validation loss, found 0"):
        forged_run(file, resume=True)


@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "state", [None, [256.0, 1], [3.0, 1, 1], [0.0, 1, 1], [256.0, -1, 0], [256.0, 0, 1.5], ["x", 0, 0], [2.0**99, 0, 0]]
)
def test_a_forged_loss_scale_is_refused(file: Path, state: Any) -> None:
    def run(resume: bool) -> None:
        net, scaling = network(dtype="float16"), gpuback.LossScaling()
        gpuback.fit(net, *data(), epochs=1 + resume, seed=1, loss_scaling=scaling, checkpoint=file, resume=resume)

    run(resume=False)
    forge(file, loss_scale=state)
    with pytest.raises(FileFormatError, match="loss_scale: expected"):
        run(resume=True)


@pytest.mark.numpy_only
@pytest.mark.parametrize("steps", [10**8, 10**12, 2**53])
def test_any_number_of_steps_is_resumed_at_once(file: Path, steps: int) -> None:
    forged_run(file, resume=False)
    forge(file, step_count=steps)
    started = time.monotonic()
    assert forged_run(file, resume=True)[1].step_count > steps
    assert time.monotonic() - started < 3
