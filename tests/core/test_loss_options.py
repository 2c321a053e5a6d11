"""Losses as users choose them: names, objects with options, functions; what they are saved as; and what is refused."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, losses
from gpuback._core import persistence
from gpuback._core.losses import LOSSES, OwnLoss, loss_of, saved_loss
from gpuback.errors import FileFormatError, LabelError, OptionError, ShapeError
from gpuback.testing import random_batch

PUBLIC = [value for value in vars(losses).values() if isinstance(value, type)]

CHOICES = [
    losses.CrossEntropy(label_smoothing=0.1),
    losses.CrossEntropy(class_weight=[1, 0, 2.5]),
    losses.Huber(0.5),
    losses.Quantile(0.9),
    losses.Quantile(np.array([0.1, 0.5, 0.9])),
]


def squared(y_hat: Any, y: Any) -> tuple[Any, Any]:
    return 0.5 * ((y_hat - y) ** 2).sum(axis=1), y_hat - y


def test_every_class_is_a_name_and_every_name_a_class() -> None:
    assert {type(row) for row in LOSSES.values()} == {*PUBLIC} - {losses.Loss}
    assert [MLP([2, 3], loss=name).architecture.loss_row for name in LOSSES] == list(LOSSES.values())


@pytest.mark.parametrize("row", [*LOSSES.values(), *CHOICES], ids=repr)
def test_a_loss_comes_back_from_what_it_is_saved_as(row: losses.Loss) -> None:
    option = json.loads(json.dumps(row.as_option()))
    assert saved_loss(option) == row and hash(saved_loss(option)) == hash(row)
    assert pickle.loads(pickle.dumps(row)) == copy.deepcopy(row) == row
    assert isinstance(option, str) == (row in LOSSES.values())
    assert eval(repr(row), vars(losses)) == row


def test_losses_differ_by_kind_and_options() -> None:
    assert len({*LOSSES.values(), *CHOICES}) == len(LOSSES) + len(CHOICES)
    assert losses.Huber(1.0) == losses.Huber() != losses.AbsoluteError()


@pytest.mark.parametrize("row", [*LOSSES.values(), *CHOICES, OwnLoss(squared)], ids=repr)
def test_a_loss_does_not_change(row: losses.Loss) -> None:
    before = repr(row)
    for loss in (row, copy.copy(row), pickle.loads(pickle.dumps(row))):
        for name in {"name", "kernel_id", "outputs", "options", "new", *vars(row)}:
            with pytest.raises(AttributeError, match=f"{name}: a loss does not change, since networks share it"):
                setattr(loss, name, 9.0)
            with pytest.raises(AttributeError, match="a loss does not change"):
                delattr(loss, name)
        assert repr(loss) == before and loss == row


class Mine(losses.Loss):
    name, kernel_id, targets, outputs = "mine", 4, "values", losses.Huber.outputs


class Other(losses.Huber): ...


class Focal:
    def __call__(self, y_hat: Any, y: Any) -> tuple[Any, Any]:
        return squared(y_hat, y)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (losses.Huber, "the class Huber"),
        (Focal, "the class Focal"),
        (Mine, "the class Mine"),
        (Mine(), "an object of Mine, a subclass that gpuback does not know"),
        (Other(), "an object of Other, a subclass that gpuback does not know"),
        ({"name": "huber", "delta": 0.5}, "{'name': 'huber', 'delta': 0.5}"),
        ({"nme": "huber"}, "{'nme': 'huber'}"),
        (None, "None"),
        (3, "3"),
    ],
)  # fmt: skip
def test_what_is_no_loss(loss: Any, got: str) -> None:
    says = f"an object of gpuback.losses or a function of (ŷ, y), got {got}"
    with pytest.raises(OptionError, match=r"^loss: expected a name \(cross_entropy, .*" + re.escape(says) + "$"):
        loss_of(loss)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"nme": "huber"}, "loss: expected a name with options, got {'nme': 'huber'}"),
        ({"name": ["huber"]}, "loss: expected a name with options, got {'name': ['huber']}"),
        ({"name": "huber", "beta": 1}, "loss 'huber': expected options ['delta'], got {'name': 'huber', 'beta': 1}"),
        ({"name": "hubre"}, "unknown loss 'hubre'. Did you mean 'huber'?"),
        ({"name": "huber", "delta": "1"}, "delta: expected a finite number > 0, got '1'"),
    ],
)
def test_files_of_losses_that_there_are_not(saved: Any, says: str, tmp_path: Any) -> None:
    net = MLP([2, 1], loss="huber", backend="numpy")
    options = net.architecture.as_options() | {"loss": saved}
    persistence.write(tmp_path / "net", {"theta": net.theta}, {"architecture": options}, kind="model")
    with pytest.raises(FileFormatError, match="one that makes no network: " + re.escape(says)):
        MLP.load(tmp_path / "net", "numpy")


def test_files_of_plain_losses_hold_the_name_alone(tmp_path: Any) -> None:
    for loss, saved in [("squared_error", "squared_error"), (losses.Huber(), "huber"), (losses.Poisson(), "poisson")]:
        assert MLP([2, 3], loss=loss).architecture.as_options()["loss"] == saved
    assert MLP([2, 3], loss=losses.Huber(0.5)).architecture.as_options()["loss"] == {"name": "huber", "delta": 0.5}


@pytest.mark.parametrize("row", CHOICES, ids=repr)
def test_a_network_keeps_its_loss(row: losses.Loss, tmp_path: Any) -> None:
    net = MLP([2, 4, 3], loss=row, seed=0, backend="numpy")
    net.save(tmp_path / "net")
    batch = random_batch(net, 5)
    for other in (
        MLP.load(tmp_path / "net", "numpy"),
        pickle.loads(pickle.dumps(net)),
        copy.copy(net),
        net.to("numpy"),
    ):
        assert other.architecture == net.architecture
        assert other.loss(*batch).tobytes() == net.loss(*batch).tobytes()
        assert repr(row) in repr(other)


def test_a_network_of_a_function_is_saved_by_its_name(tmp_path: Any) -> None:
    net = MLP([2, 4, 1], loss=squared, seed=0, backend="numpy")
    net.save(tmp_path / "net")
    x, y = np.ones((3, 2)), np.ones((3, 1))
    loaded = MLP.load(tmp_path / "net", "numpy")
    assert loaded.forward(x).tobytes() == net.forward(x).tobytes()
    assert "loss=squared" in repr(net) and repr(loaded) == repr(net)
    says = re.escape("this network's loss was a function, 'squared': MLP.load(path, loss=…)")
    for refused in (
        lambda: loaded.loss(x, y),
        lambda: loaded.value_and_grad(x, y),
        lambda: loaded.trace(x, y),
        lambda: loaded.per_sample_grad(x, y),
        lambda: gpuback.fit(loaded, x, y),
        lambda: gpuback.TrainStep(loaded, gpuback.Adam())(x, y),
        lambda: gpuback.check_gradients(loaded, x, y),
    ):
        with pytest.raises(OptionError, match=says):
            refused()
    again = MLP.load(tmp_path / "net", "numpy", loss=squared)
    assert again.architecture == net.architecture and again.loss(x, y) == net.loss(x, y)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    assert pickle.loads(pickle.dumps(net)).loss(x, y) == copy.deepcopy(net).loss(x, y) == net.loss(x, y)


def test_load_takes_another_loss(tmp_path: Any) -> None:
    MLP([2, 1], loss="squared_error", seed=0).save(tmp_path / "net")
    assert MLP.load(tmp_path / "net", loss="huber").architecture.loss_row == losses.Huber()
    with pytest.raises(OptionError, match="loss 'poisson' goes with output 'exponential', not with 'identity'"):
        MLP.load(tmp_path / "net", loss="poisson")


def test_what_a_function_is_called() -> None:
    names = [OwnLoss(f).name for f in (squared, functools.partial(squared), Focal(), lambda y_hat, y: None)]
    assert names == ["squared", "squared", "Focal", "<lambda>"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: losses.Huber(0), "delta: expected a finite number > 0, got 0"),
        (lambda: losses.Huber(float("nan")), "delta: expected a finite number > 0, got nan"),
        (lambda: losses.Quantile(0.0), "q: expected a number between 0 and 1, or one for each output, got 0.0"),
        (lambda: losses.Quantile([0.5, 1.0]), "q: expected a number between 0 and 1"),
        (lambda: losses.Quantile([]), "q: expected a number between 0 and 1"),
        (lambda: losses.CrossEntropy(label_smoothing=1.0), "label_smoothing: expected a finite number ≥ 0 and < 1"),
        (lambda: losses.CrossEntropy(label_smoothing=-0.1), "label_smoothing: expected a finite number ≥ 0 and < 1"),
        (lambda: MLP([2, 3], loss=losses.CrossEntropy(class_weight=[1, 2])), "class_weight: expected 3 numbers"),
        (lambda: MLP([2, 3], loss=losses.Quantile([0.1, 0.9])), "q: expected one number, or 3, one for each"),
        (lambda: MLP([2, 3], loss="hinge"), "unknown loss 'hinge'. Known: absolute_error, binary_cross_entropy"),
        (lambda: MLP([2, 3], loss="hubre"), "Did you mean 'huber'?"),
        (lambda: MLP([2, 3], loss=3), "loss: expected a name"),
        (lambda: MLP([2, 3], loss="poisson", output="identity"), "loss 'poisson' goes with output 'exponential'"),
        (lambda: MLP([2, 3], loss="huber", output="softmax"), "loss 'huber' goes with output 'identity' or 'sigmoid'"),
        (lambda: MLP([2, 3], loss=squared, output="linear"), "unknown output 'linear'"),
        (lambda: MLP([2, 3], loss=squared, output="softmaxx"), "unknown output 'softmaxx'. Did you mean 'softmax'?"),
        (lambda: MLP([2, 3], loss=squared, reproducible=True), "reproducible=True: expected one of gpuback's losses"),
        (lambda: random_batch(MLP([2, 3], loss=squared), 4), "random targets: expected one of gpuback's losses"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=re.escape(says)):
        make()


@pytest.mark.parametrize("values", [2, None, "balanced", {0: 0.1, 1: 0.5}, {0.1, 0.5}, frozenset({0.1}), np.array(0.5)])
def test_what_is_no_sequence_of_numbers(values: Any) -> None:
    says = re.escape(f"q: expected a number between 0 and 1, or one for each output, got {values!r}")
    with pytest.raises(OptionError, match=f"^{says}$"):
        losses.Quantile(values)
    if values is not None:
        says = re.escape(f"class_weight: expected a sequence of numbers, one for each class, got {values!r}")
        with pytest.raises(OptionError, match=f"^{says}$"):
            losses.CrossEntropy(class_weight=values)


@pytest.mark.parametrize("values", [[], [0, 0], [1, -1], [1, np.inf], [1, np.nan], [1, "2"], [[1, 2]]])
def test_what_are_no_class_weights(values: Any) -> None:
    with pytest.raises(OptionError, match=r"^class_weight: expected finite numbers ≥ 0, not all of them 0, got \["):
        losses.CrossEntropy(class_weight=values)


@pytest.mark.on_each_backend
@pytest.mark.parametrize("y", [[[1.0], [-1.0]], [[3], [-(2**40)]]])
def test_counts_below_zero_are_refused(y: Any) -> None:
    with pytest.raises(LabelError, match="y: expected numbers ≥ 0 for loss 'poisson', got -"):
        MLP([2, 1], loss="poisson").loss(np.ones((2, 2)), y)


@pytest.mark.on_each_backend
def test_several_quantiles_of_one_number() -> None:
    net = MLP([2, 3], loss=losses.Quantile([0.1, 0.5, 0.9]), seed=0, dtype="float64")
    x, y = np.random.default_rng(0).standard_normal((2, 5, 2))
    one = y[:, 0]
    expected = net.loss(x, np.repeat(one[:, None], 3, axis=1))
    assert net.loss(x, one) == net.loss(x, one[:, None]) == expected
    with pytest.raises(ShapeError, match=re.escape("y: expected shape (5,) or (5, 3) for loss 'quantile', got (5, 2)")):
        net.loss(x, y)
