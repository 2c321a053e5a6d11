"""gpuback.fit: what it trains on, in which order, what it reports, when it stops, and what it refuses."""

from __future__ import annotations

import copy
import math
from itertools import count
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, SGD, Adam, AdamW, History, TrainStep
from gpuback._core.parameters import permutation
from gpuback.errors import DataError, DivergedError, DtypeError, LabelError, OptionError, ShapeError

pytestmark = pytest.mark.on_each_backend


def blobs(n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three clusters in the plane, far apart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n)
    centres = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return (centres[y] + 0.3 * rng.standard_normal((n, 2))).astype(np.float32), y


def classifier(**options: Any) -> MLP:
    return MLP([2, 8, 3], activation="tanh", seed=0, **options)


def accuracy(net: MLP, x: np.ndarray, y: np.ndarray) -> float:
    return float((net.forward(x).argmax(axis=1) == y).mean())


def state_of(net: MLP, optimizer: Any) -> tuple[Any, ...]:
    return net.theta.tobytes(), {name: a.tobytes() for name, a in optimizer.state.items()}, optimizer.step_count


def one_weight_each(n: int) -> tuple[MLP, np.ndarray]:
    """A network and n samples x_i = e_i, each of which moves the weight w_i and no other."""
    net = MLP([n, 1], loss="squared_error")
    net.theta[:] = 0
    return net, np.eye(n, dtype=np.float32)


# --- it learns


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"batch_size": None, "epochs": 300}, {"clip_norm": 0.1}, {"shuffle": False}])
def test_it_learns_three_clusters(dtype: str, options: Any) -> None:
    x, y = blobs()
    net = classifier(dtype=dtype)
    history = gpuback.fit(net, x, y, **({"epochs": 30, "batch_size": 16, "optimizer": Adam(0.02), "seed": 0} | options))
    assert accuracy(net, *blobs(seed=1)) > 0.99
    assert history.loss[-1] < 0.2 * history.loss[0]


@pytest.mark.thorough(first=2)
@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.05, 0.9, True), Adam(0.01), AdamW(0.01), None], ids=repr)
def test_it_learns_iris(optimizer: Any) -> None:
    x, y = pytest.importorskip("sklearn.datasets").load_iris(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    net = MLP([4, 16, 3], seed=0)
    gpuback.fit(net, x, y, optimizer=copy.deepcopy(optimizer), epochs=100, batch_size=16, seed=0)
    assert accuracy(net, x, y) > 0.95


def test_full_batches_are_plain_gradient_descent() -> None:
    """θ ← θ − η ∇θ on all samples, in their own order whatever `shuffle` says."""
    x, y = blobs(50)
    net, twin = classifier(), classifier()
    history = gpuback.fit(net, x, y, optimizer=SGD(0.1), batch_size=None, epochs=5, seed=0)
    optimizer = SGD(0.1)
    losses = []
    for _ in range(5):
        loss, gradients = twin.value_and_grad(x, y)
        optimizer.step(twin, gradients)
        losses.append(float(loss))
    assert net.theta.tobytes() == twin.theta.tobytes()
    assert history.loss == pytest.approx(losses, rel=2**-23)
    assert history.steps == 5


# --- it is the loop that anyone would write


def by_hand(
    net: MLP,
    optimizer: Any,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    sample_weight: np.ndarray | None = None,
    shuffle: bool = True,
    clip_norm: float | None = None,
) -> list[float]:
    """The documented order: epoch e goes through permutation(n, seed, e), what is left over last."""
    step, losses = TrainStep(net, optimizer, clip_norm=clip_norm), []
    for epoch in range(epochs):
        order = permutation(len(x), seed, epoch) if shuffle else np.arange(len(x))
        total = 0.0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            weight = None if sample_weight is None else sample_weight[rows]
            total += len(rows) * float(step(x[rows], y[rows], weight))
        losses.append(total / len(x))
    return losses


@pytest.mark.parametrize(
    "n, options",
    [
        (50, {"batch_size": 16}),  # 16, 16, 16, 2
        (49, {"batch_size": 16}),  # the last has one sample
        (48, {"batch_size": 16}),  # none left over
        (50, {"batch_size": 50}),
        (50, {"batch_size": 1}),
        (50, {"batch_size": 1000}),  # more than there are: shuffled all the same
        (50, {"batch_size": 16, "shuffle": False}),
        (50, {"batch_size": 16, "clip_norm": 0.01}),
        (1, {"batch_size": 16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_theta_optimizer_and_losses_are_those_of_the_loop_by_hand(n: int, options: Any, weighted: bool) -> None:
    x, y = blobs(n)
    weight = np.random.default_rng(1).uniform(0.1, 3, n).astype(np.float32) if weighted else None
    net, twin, optimizer, twins = classifier(), classifier(), Adam(0.01), Adam(0.01)
    history = gpuback.fit(net, x, y, sample_weight=weight, optimizer=optimizer, epochs=3, seed=7, **options)
    losses = by_hand(twin, twins, x, y, sample_weight=weight, epochs=3, seed=7, **options)
    assert state_of(net, optimizer) == state_of(twin, twins)
    assert history.loss == pytest.approx(losses, rel=1e-6)
    assert history.steps == optimizer.step_count


@pytest.mark.parametrize("precision", [{"dtype": d} for d in ("float64", "bfloat16", "float16")], ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "squared_error"])
def test_the_loop_by_hand_in_every_dtype_with_rows_of_targets(precision: Any, loss: str) -> None:
    x, y = blobs(50)
    rows = np.eye(3)[y]
    net, twin, optimizer, twins = (
        *(classifier(loss=loss, **precision) for _ in range(2)),
        SGD(0.1, 0.9),
        SGD(0.1, 0.9),
    )
    gpuback.fit(net, x, rows, optimizer=optimizer, epochs=2, batch_size=16, seed=7)
    by_hand(twin, twins, x, rows, epochs=2, batch_size=16, seed=7)
    assert state_of(net, optimizer) == state_of(twin, twins)


def test_the_default_optimizer_is_adam_and_the_default_batch_128() -> None:
    x, y = blobs(300)
    net, twin = classifier(), classifier()
    history = gpuback.fit(net, x, y, epochs=2, seed=0)
    by_hand(twin, Adam(), x, y, epochs=2, batch_size=128, seed=0)
    assert net.theta.tobytes() == twin.theta.tobytes()
    assert (history.epochs, history.steps) == (2, 6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 100, None])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_is_seen_once_an_epoch(batch_size: int | None, shuffle: bool) -> None:
    """SGD on x_i = e_i: w_i is moved by sample i alone, by η w y_i / B, of which 1 / B is scaled away here."""
    n, size = 10, min(batch_size or 10, 10)
    net, x = one_weight_each(n)
    y = 2.0 ** -np.arange(n)
    weight = np.full(n, 2.0**-20)  # so small that a prediction hardly differs from 0
    gpuback.fit(
        net, x, y, sample_weight=weight, optimizer=SGD(1.0), epochs=1, batch_size=batch_size, shuffle=shuffle, seed=3
    )
    sizes = np.full(n, size)
    if n % size:
        order = permutation(n, 3, 0) if shuffle else np.arange(n)
        sizes[order[n - n % size :]] = n % size
    np.testing.assert_allclose(net.weights[0][0], y * 2.0**-20 / sizes, rtol=2e-3)


@pytest.mark.parametrize("fraction, held_out", [(0.25, 10), (0.1, 4), (0.001, 1), (0.975, 39), (0.5, 20)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_fraction_is_held_out_and_not_trained_on(fraction: float, held_out: int, shuffle: bool) -> None:
    net, x = one_weight_each(40)
    y = np.arange(1.0, 41.0)
    weight = np.random.default_rng(0).uniform(1, 2, 40)
    history = gpuback.fit(
        net,
        x,
        y,
        sample_weight=weight,
        optimizer=SGD(0.1),
        epochs=3,
        batch_size=7,
        validation=fraction,
        shuffle=shuffle,
        seed=1,
    )
    left = np.flatnonzero(net.weights[0][0] == 0)
    assert len(left) == held_out
    expected = float(net.loss(x[left], y[left], sample_weight=weight[left]))
    assert history.validation_loss[-1] == pytest.approx(expected, rel=1e-6)
    assert history.steps == 3 * -(-(40 - held_out) // 7)


def test_the_samples_held_out_are_drawn_at_random() -> None:
    def held_out(seed: int) -> tuple[int, ...]:
        net, x = one_weight_each(40)
        gpuback.fit(net, x, np.ones(40), optimizer=SGD(0.1), epochs=1, validation=0.25, seed=seed)
        return tuple(np.flatnonzero(net.weights[0][0] == 0))

    splits = {held_out(seed) for seed in range(5)}
    assert len(splits) == 5
    assert len({row for split in splits for row in split}) > 20
    assert held_out(0) == held_out(0)


def test_validation_data_of_ones_own() -> None:
    (x, y), (x_val, y_val) = blobs(), blobs(33, seed=1)
    net, twin = classifier(), classifier()
    seen: list[float] = []
    history = gpuback.fit(
        net,
        x,
        y,
        epochs=3,
        seed=0,
        validation=(x_val.tolist(), y_val.tolist()),
        callbacks=[lambda net, _: seen.append(float(net.loss(x_val, y_val)))],
    )
    gpuback.fit(twin, x, y, epochs=3, seed=0)
    assert history.validation_loss == seen
    assert net.theta.tobytes() == twin.theta.tobytes(), "to watch is not to touch"
    assert history.best_epoch == int(np.argmin(seen))


def test_data_in_any_form_make_the_same_bits() -> None:
    x, y = blobs(50)
    x = np.round(x * 8)
    thetas = set()
    for form in (x, x.tolist(), x.astype(np.float64), np.asfortranarray(x), x.astype(np.int32), x[::-1].copy()[::-1]):
        net = classifier()
        gpuback.fit(net, form, y.tolist(), epochs=2, batch_size=16, seed=0, sample_weight=[1] * 50)
        thetas.add(net.theta.tobytes())
    assert len(thetas) == 1


def test_the_data_are_only_read() -> None:
    x, y = blobs(50)
    weight = np.ones(50, np.float32)
    before = [part.tobytes() for part in (x, y, weight)]
    for part in (x, y, weight):
        part.flags.writeable = False
    gpuback.fit(classifier(), x, y, sample_weight=weight, epochs=2, batch_size=16, validation=0.2, seed=0)
    gpuback.fit(classifier(), x, y, sample_weight=weight, epochs=2, batch_size=16, shuffle=False)
    assert [part.tobytes() for part in (x, y, weight)] == before


def test_a_second_fit_goes_on_with_the_same_optimizer() -> None:
    x, y = blobs(50)
    net, twin, optimizer, twins = classifier(), classifier(), Adam(), Adam()
    for seed in (1, 2):
        gpuback.fit(net, x, y, optimizer=optimizer, epochs=2, batch_size=16, seed=seed)
        by_hand(twin, twins, x, y, epochs=2, batch_size=16, seed=seed)
    assert state_of(net, optimizer) == state_of(twin, twins)


# --- seeds


def theta_after(seed: int | None, **options: Any) -> bytes:
    net = classifier()
    gpuback.fit(net, *blobs(), epochs=2, batch_size=16, seed=seed, **options)
    return net.theta.tobytes()


@pytest.mark.parametrize("options", [{}, {"validation": 0.3}, {"shuffle": False, "validation": 0.3}], ids=str)
def test_a_seed_makes_a_run_repeatable(options: Any) -> None:
    assert theta_after(5, **options) == theta_after(5, **options) == theta_after(np.int64(5), **options)
    assert theta_after(5, **options) != theta_after(6, **options)
    assert len({theta_after(None, **options) for _ in range(3)}) == 3


def test_without_shuffling_there_is_nothing_to_seed() -> None:
    assert len({theta_after(seed, shuffle=False) for seed in (None, 0, 1)}) == 1


def test_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(0)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    theta_after(None, validation=0.3)
    assert np.random.random() == expected  # noqa: NPY002


def test_each_epoch_has_an_order_of_its_own() -> None:
    orders = [tuple(permutation(20, seed, epoch)) for seed in (0, 1) for epoch in range(5)]
    assert len(set(orders)) == 10
    assert all(sorted(order) == list(range(20)) for order in orders)


# --- history, callbacks


def test_history_without_validation() -> None:
    history = gpuback.fit(classifier(), *blobs(), epochs=4, batch_size=50, seed=0)
    assert isinstance(history, History)
    assert (history.epochs, history.steps, len(history.loss)) == (4, 12, 4)
    assert (history.validation_loss, history.best_epoch, history.stopped_early) == ([], None, False)
    assert all(type(loss) is float for loss in history.loss)
    assert history.seconds > 0


def test_zero_epochs_change_nothing() -> None:
    net = classifier()
    before = net.theta.tobytes()
    assert gpuback.fit(net, *blobs(), epochs=0, validation=0.2, patience=1) == History()
    assert net.theta.tobytes() == before


def test_callbacks_are_called_in_turn_once_an_epoch() -> None:
    calls: list[tuple[Any, ...]] = []

    def first(net: MLP, history: History) -> None:
        calls.append(("first", net, history.epochs, len(history.validation_loss), history.steps))

    def second(net: MLP, history: History) -> None:
        calls.append(("second", net, history.epochs, len(history.validation_loss), history.steps))

    net = classifier()
    gpuback.fit(net, *blobs(), epochs=2, batch_size=40, validation=blobs(9), callbacks=[first, second])
    assert calls == [(name, net, e, e, 3 * e) for e in (1, 2) for name in ("first", "second")]


def test_a_callback_that_returns_true_stops_training() -> None:
    calls: list[int] = []

    def third_time(net: MLP, history: History) -> bool:
        calls.append(history.epochs)
        return history.epochs == 3

    history = gpuback.fit(classifier(), *blobs(), epochs=10, seed=0, callbacks=[third_time, lambda *_: None])
    assert (calls, history.epochs, history.stopped_early) == ([1, 2, 3], 3, True)


def test_a_callback_may_return_numpys_true() -> None:
    x, y = blobs()
    history = gpuback.fit(classifier(), x, y, epochs=10, callbacks=[lambda net, _: net.loss(x, y) < 1e9])
    assert history.epochs == 1
    history = gpuback.fit(classifier(), x, y, epochs=10, callbacks=[lambda *_: np.array(True)])  # as of CuPy's numbers
    assert history.epochs == 1


def test_the_validation_loss_of_micro_batches_is_that_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs()
    weight = np.random.default_rng(0).uniform(0.5, 2.0, len(x))
    sizes: list[int] = []
    loss = MLP.loss
    monkeypatch.setattr(
        MLP, "loss", lambda net, x, *given, **options: sizes.append(len(x)) or loss(net, x, *given, **options)
    )
    options = {"epochs": 3, "seed": 0, "validation": 0.3, "sample_weight": weight}
    whole = gpuback.fit(classifier(), x, y, **options)
    few = gpuback.fit(classifier(), x, y, micro_batch_size=7, **options)
    assert few.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)
    assert max(sizes[3:]) == 7


@pytest.mark.parametrize(
    "value",
    [1, 0.5, -1, np.bool_(True), np.int8(1), np.float32(0.5), np.array(True), np.array(2), np.array(0.5), math.inf],
    ids=repr,
)
def test_any_true_scalar_stops_training(value: Any) -> None:
    for returned, epochs in ((value, 1), (value * 0 if math.isfinite(value) else 0, 3)):
        history = gpuback.fit(classifier(), *blobs(), epochs=3, callbacks=[lambda *_, v=returned: v])
        assert (history.epochs, history.stopped_early) == (epochs, epochs == 1)
        assert type(history.stopped_early) is bool


@pytest.mark.parametrize(
    "value", [None, "stop", b"stop", [True], (1,), {"stop": True}, np.ones(1), np.ones((2, 2)), {1}]
)
def test_what_is_no_scalar_does_not(value: Any) -> None:
    history = gpuback.fit(classifier(), *blobs(), epochs=2, callbacks=[lambda *_: value])
    assert (history.epochs, history.stopped_early) == (2, False)


def test_a_callback_may_change_theta_and_the_learning_rate() -> None:
    optimizer = SGD(0.1)

    def freeze(net: MLP, history: History) -> None:
        net.theta[:] = 1
        optimizer.learning_rate = 0.0

    net = classifier()
    gpuback.fit(net, *blobs(), optimizer=optimizer, epochs=3, callbacks=[freeze])
    assert (net.theta == 1).all()


# --- early stopping


def overfitting(patience: int | None, **options: Any) -> tuple[MLP, History, list[np.ndarray]]:
    """Training draws a bias from 0 to 1; on the way it passes 0.52, where the validation loss is least."""
    net = MLP([1, 1], loss="squared_error")
    net.theta[:] = 0
    thetas: list[np.ndarray] = []
    history = gpuback.fit(
        net,
        np.zeros((4, 1)),
        np.ones(4),
        optimizer=SGD(0.1),
        batch_size=None,
        epochs=30,
        validation=(np.zeros((1, 1)), [0.52]),
        patience=patience,
        callbacks=[lambda net, _: thetas.append(net.theta.copy())],
        **options,
    )
    return net, history, thetas


@pytest.mark.parametrize("patience", [1, 3, 10])
def test_patience_stops_and_restores_the_best_theta(patience: int) -> None:
    net, history, thetas = overfitting(patience)
    assert history.best_epoch == int(np.argmin(history.validation_loss)) == 6  # 1 − 0.9⁷ = 0.5217
    assert history.epochs == len(thetas) == 6 + 1 + patience
    assert history.stopped_early
    assert net.theta.tobytes() == thetas[6].tobytes()


def test_the_best_theta_is_restored_when_epochs_run_out_first() -> None:
    net, history, thetas = overfitting(100)
    assert (history.epochs, history.best_epoch, history.stopped_early) == (30, 6, False)
    assert net.theta.tobytes() == thetas[6].tobytes()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["between epochs", "within an epoch"])
def test_the_best_theta_is_restored_after_ctrl_c(interruption: Any, when: str) -> None:
    thetas, steps = [], []

    def interrupt(net: MLP, history: History) -> None:
        thetas.append(net.theta.copy())
        if history.epochs == 4 and when == "between epochs":
            raise interruption

    def schedule(step: int) -> float:
        steps.append(step)
        if step == 4 * 4 + 2 and when == "within an epoch":
            raise interruption
        return 0.01

    x, y = blobs(40)
    for patience in (100, None):
        net, validation = classifier(), blobs(9)
        thetas.clear()
        options = {"epochs": 50, "batch_size": 10, "seed": 0, "validation": (validation[0], (validation[1] + 1) % 3)}
        with pytest.raises(interruption):
            gpuback.fit(net, x, y, **options, schedule=schedule, callbacks=[interrupt], patience=patience)
        assert len(thetas) == 4
        losses = [float(with_theta(net, theta).loss(*options["validation"])) for theta in thetas]
        best = thetas[int(np.argmin(losses))]
        assert losses[-1] > min(losses), "it overfits"
        assert (net.theta.tobytes() == best.tobytes()) == (patience is not None)


def with_theta(net: MLP, theta: Any) -> MLP:
    twin = copy.copy(net)
    twin.theta = theta
    return twin


def test_without_patience_the_last_theta_stays() -> None:
    net, history, thetas = overfitting(None)
    assert (history.epochs, history.best_epoch, history.stopped_early) == (30, 6, False)
    assert net.theta.tobytes() == thetas[-1].tobytes()


def test_no_better_is_not_better() -> None:
    """An equal validation loss uses up patience, and the first of equals is the best."""
    net = MLP([1, 1], loss="squared_error")
    history = gpuback.fit(
        net, np.zeros((4, 1)), np.ones(4), optimizer=SGD(0.0), epochs=9, validation=([[0.0]], [1.0]), patience=2
    )
    assert (history.epochs, history.best_epoch) == (3, 0)


def test_a_validation_loss_that_is_nan_is_not_the_best() -> None:
    def bring_back(net: MLP, history: History) -> None:
        net.theta[:] = 0

    net = MLP([2, 1], loss="squared_error")
    net.theta[:] = [3, -3, 0]
    history = gpuback.fit(
        net,
        np.zeros((4, 2)),
        np.zeros(4),
        optimizer=SGD(0.1),
        epochs=4,
        validation=([[3e38, 3e38]], [0.0]),  # finite; but 3·3e38 − 3·3e38 is inf − inf
        patience=3,
        callbacks=[bring_back],
    )
    assert math.isnan(history.validation_loss[0])
    assert history.validation_loss[1:] == [0.0, 0.0, 0.0]
    assert history.best_epoch == 1


def test_a_validation_loss_that_stays_nan_uses_up_patience() -> None:
    net = MLP([2, 1], loss="squared_error")
    net.theta[:] = [3, -3, 0]
    history = gpuback.fit(
        net,
        np.zeros((4, 2)),
        np.zeros(4),
        optimizer=SGD(0.0),
        epochs=9,
        validation=([[3e38, 3e38]], [0.0]),
        patience=2,
    )
    assert history.epochs <= 3
    assert history.stopped_early


# --- progress


@pytest.mark.parametrize("progress", [None, False, True])
def test_progress_goes_to_stderr(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    net, twin = classifier(), classifier()
    gpuback.fit(net, *blobs(), epochs=2, batch_size=50, seed=0, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    if progress:
        assert "6/6" in err and "loss" in err
    else:
        assert err == ""
    gpuback.fit(twin, *blobs(), epochs=2, batch_size=50, seed=0, progress=False)
    assert net.theta.tobytes() == twin.theta.tobytes()


# --- data that are refused


def spoilt(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array = array.astype(np.float64)
    array.reshape(len(array), -1)[row, -1] = value
    return array


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 37, 49])
def test_data_that_are_not_finite(value: float, row: int) -> None:
    x, y = blobs(50)
    rows = np.eye(3)[y]
    for name, data in (
        ("x", {"x": spoilt(x, row, value), "y": rows}),
        ("y", {"x": x, "y": spoilt(rows, row, value)}),
        ("sample_weight", {"x": x, "y": rows, "sample_weight": spoilt(np.ones(50), row, value)}),
    ):
        net = classifier(loss="squared_error")
        before = net.theta.tobytes()
        with pytest.raises(DataError, match=rf"^{name}: expected finite numbers .* in row {row}$"):
            gpuback.fit(net, **data)
        assert net.theta.tobytes() == before


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_probabilities_that_are_nan(loss: str) -> None:
    x, y = blobs(50)
    with pytest.raises(DataError, match="^y: .* NaN.* in row 7$"):
        gpuback.fit(classifier(loss=loss), x, spoilt(np.eye(3)[y], 7, math.nan))


def test_validation_data_that_are_not_finite() -> None:
    x, y = blobs(50)
    with pytest.raises(DataError, match="^validation x: .* NaN.* in row 3$"):
        gpuback.fit(classifier(), x, y, validation=(spoilt(x, 3, math.nan), y))


def test_data_too_large_for_float16() -> None:
    x, y = blobs(50)
    for value in (1e5, -1e5):
        with pytest.raises(DataError, match="^x: expected .* numbers that float16 can hold, .* in row 4$"):
            gpuback.fit(classifier(dtype="float16"), spoilt(x, 4, value), y)
        gpuback.fit(classifier(dtype="bfloat16"), spoilt(x, 4, value), y, epochs=1)
    gpuback.fit(classifier(dtype="float16"), spoilt(x, 4, 65504.0), y, epochs=1)


def test_data_too_large_for_float32() -> None:
    x, y = blobs(50)
    with pytest.raises(DataError, match="^x: expected .* numbers that float32 can hold, .* in row 4$"):
        gpuback.fit(classifier(), spoilt(x, 4, 1e39), y)


@pytest.mark.parametrize(
    "x, y, error",
    [
        (np.ones((50, 3)), np.zeros(50, int), ShapeError),
        (np.ones((50, 2)), np.zeros(49, int), ShapeError),
        (np.ones((0, 2)), np.zeros(0, int), ShapeError),
        (np.ones((50, 2)), np.full(50, 3), LabelError),
        (np.ones((50, 2)), np.zeros(50), DtypeError),
        (np.ones((50, 2)) * 1j, np.zeros(50, int), DtypeError),
    ],
)
def test_data_that_do_not_fit(x: Any, y: Any, error: type[Exception]) -> None:
    net = classifier()
    with pytest.raises(error):
        gpuback.fit(net, x, y)
    with pytest.raises(error):
        gpuback.fit(net, *blobs(), validation=(x, y))
    assert net.theta.tobytes() == classifier().theta.tobytes()


# --- divergence


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize("clip_norm", [None, 1e6])
def test_divergence_leaves_the_state_of_the_last_finite_step(kind: Any, clip_norm: float | None) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 2)), rng.standard_normal((50, 1))
    net, twin = (MLP([2, 1], loss="squared_error", seed=0) for _ in range(2))
    optimizer, twins = kind(0.01), kind(0.01)

    def faster(net: MLP, history: History) -> None:
        optimizer.learning_rate *= 1000

    with pytest.raises(DivergedError, match="was not finite at step") as caught:
        gpuback.fit(
            net,
            x,
            y,
            optimizer=optimizer,
            epochs=100,
            batch_size=16,
            seed=3,
            clip_norm=clip_norm,
            callbacks=[faster],
        )
    error = caught.value

    step, before = TrainStep(twin, twins, clip_norm=clip_norm), None
    for epoch, rows in ((e, rows) for e in count() for rows in np.split(permutation(50, 3, e), [16, 32, 48])):
        twins.learning_rate = 0.01
        for _ in range(epoch):
            twins.learning_rate *= 1000
        before = state_of(twin, twins)
        loss = step(x[rows], y[rows])
        if step.diverged_at is not None:
            break
    assert (error.step, error.epoch) == (step.diverged_at, epoch)
    assert error.epoch == error.step // 4 >= 1
    assert optimizer.step_count == error.step
    assert state_of(net, optimizer) == before
    assert np.isfinite(net.theta).all()
    assert f"step {error.step} (epoch {error.epoch})" in str(error)
    assert ("gradient" if math.isfinite(loss) else "loss") in str(error)
    assert isinstance(error, FloatingPointError)


def test_divergence_at_the_first_step() -> None:
    x, y = blobs(50)
    net = MLP([2, 1], loss="squared_error", seed=0)
    before = net.theta.tobytes()
    with pytest.raises(DivergedError, match="loss was not finite at step 0 ") as caught:
        gpuback.fit(net, x * np.float32(1e30), y.astype(float))
    assert (caught.value.step, caught.value.epoch) == (0, 0)
    assert net.theta.tobytes() == before


def test_an_update_that_overflows_is_a_divergence() -> None:
    with pytest.raises(DivergedError, match="the update of step 0 overflowed") as caught:
        gpuback.fit(classifier(), *blobs(), optimizer=SGD(1e39), epochs=1, batch_size=None)
    assert (caught.value.step, caught.value.epoch) == (0, 0)


# --- options that are refused


@pytest.mark.parametrize(
    "options, named",
    [
        *(({name: value}, name) for name in ("epochs", "batch_size") for value in (-1, 2.0, "3", True, math.nan)),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": None}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "seed"}, "seed"),
        *(({"patience": value, "validation": 0.2}, "patience") for value in (0, -1, 1.5, "1")),
        ({"patience": 3}, "patience"),
        *(({"validation": value}, "validation") for value in (0, 0.0, 1, 1.0, -0.1, 1.5, math.nan, True, 0.9999)),
        *(({"validation": value}, "validation") for value in ("half", [], [1], np.zeros((3, 3)), {})),
        *(({"clip_norm": value}, "clip_norm") for value in (0, -1.0, math.nan, math.inf)),
        ({"resume": True}, "resume=True needs checkpoint="),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: Any, named: str) -> None:
    net = classifier()
    with pytest.raises(OptionError, match=f"^{named}"):
        gpuback.fit(net, *blobs(50), **options)
    assert net.theta.tobytes() == classifier().theta.tobytes()


def test_an_optimizer_of_another_network_is_refused() -> None:
    optimizer = Adam()
    gpuback.fit(classifier(), *blobs(50), optimizer=optimizer, epochs=1)
    with pytest.raises(OptionError, match="another network"):
        gpuback.fit(classifier(), *blobs(50), optimizer=optimizer, epochs=1)


def test_a_reused_optimizers_earlier_steps_are_not_counted() -> None:
    net, optimizer = classifier(), Adam()
    x, y = blobs(60)
    assert [gpuback.fit(net, x, y, optimizer=optimizer, epochs=2, batch_size=20).steps for _ in range(2)] == [6, 6]


@pytest.mark.parametrize(
    "options", [{"optimizer": "adam"}, {"callbacks": print}, {"callbacks": None}, {"callbacks": ["print"]}]
)
def test_options_of_the_wrong_kind(options: Any) -> None:
    with pytest.raises(OptionError, match=f"^{next(iter(options))}: expected"):
        gpuback.fit(classifier(), *blobs(10), **options)
