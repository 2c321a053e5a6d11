"""Copies and pickles: what goes on as the original, what is its own, and what refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuback
import gpuback._backends.registry
from gpuback import MLP, SGD, Adam, AdamW, LossScaling, TrainStep, losses, schedules
from gpuback._backends.registry import Backend, BackendStatus
from gpuback.errors import BackendError, CopyError, OptionError
from gpuback.testing import random_batch, random_layer

pytestmark = pytest.mark.on_each_backend(layers=True)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


deep = pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])

STEPS: dict[str, Callable[[], TrainStep]] = {
    "SGD": lambda: TrainStep(network(), SGD(0.1)),
    "Nesterov": lambda: TrainStep(network(), SGD(0.1, 0.9, nesterov=True, weight_decay=0.01), clip_norm=0.1),
    "Adam": lambda: TrainStep(network(dtype="float64"), Adam(0.01)),
    "AdamW, micro-batches": lambda: TrainStep(network(), AdamW(0.01), micro_batch_size=5, clip_norm=1.0),
    "frozen": lambda: TrainStep(network(), SGD(0.1, 0.9, trainable=[False, (False, True), True], decay_biases=False)),
    "float16": lambda: TrainStep(network(dtype="float16"), Adam(0.01), loss_scaling=LossScaling(2.0**24, 3)),
    "reproducible": lambda: TrainStep(network(reproducible=True), Adam(0.01), clip_norm=0.1),
}


def network(**options: Any) -> MLP:
    return MLP([4, 7, 6, 3], **{"seed": 0, "activation": "tanh"} | options)


def state_of(step: TrainStep) -> tuple[Any, ...]:
    optimizer = step.optimizer
    arrays = {name: array.tobytes() for name, array in optimizer.state.items()}
    counts = optimizer.step_count, step.diverged_at, step.loss_scale, step.skipped_steps
    return step.net.theta.tobytes(), arrays, counts, repr(optimizer), step.clip_norm, step.micro_batch_size


# --- steps and optimizers


@deep
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name == "reproducible" else ()) for name in STEPS]
)
def test_a_copy_of_a_step_goes_on_as_the_original(name: str, before: int, make_copy: Any) -> None:
    step = STEPS[name]()
    batches = [random_batch(step.net, 12 + t % 2, t) for t in range(before + 4)]
    for t in range(before):
        step(*batches[t])
    twin = make_copy(step)
    start = state_of(step)
    assert state_of(twin) == start
    for t in range(before, before + 4):
        assert twin(*batches[t]).shape == ()
    assert state_of(step) == start, "the original has not moved"
    for t in range(before, before + 4):
        step(*batches[t])
    assert state_of(twin) == state_of(step) != start
    for array, its in zip(twin.optimizer.state.values(), step.optimizer.state.values(), strict=True):
        assert not np.shares_memory(array, its)


def test_a_shallow_copy_of_a_step_shares_network_and_optimizer() -> None:
    step, expected = STEPS["Nesterov"](), STEPS["Nesterov"]()
    twin = copy.copy(step)
    assert twin.net is step.net and twin.optimizer is step.optimizer
    twin.clip_norm = 7.0
    assert step.clip_norm == 0.1
    twin.clip_norm = 0.1
    batch = random_batch(step.net, 12)
    for each in (step, twin, step, twin):
        each(*batch)
        expected(*batch)
    assert state_of(step) == state_of(expected)


@deep
def test_what_a_diverged_step_tells_is_copied(make_copy: Any) -> None:
    step = STEPS["Adam"]()
    x, y = random_batch(step.net, 12)
    step(x, y)
    step(x * math.inf, y)
    assert make_copy(step).diverged_at == step.diverged_at == 1


@deep
def test_betas_that_have_changed_leave_their_powers(make_copy: Any) -> None:
    step = STEPS["Adam"]()
    batch = random_batch(step.net, 12)
    step(*batch)
    step.optimizer.betas = 0.5, 0.75
    twin = make_copy(step)
    for each in (step, twin):
        each(*batch)
    assert state_of(twin) == state_of(step)


@deep
def test_a_step_keeps_what_a_user_has_added(make_copy: Any) -> None:
    step = STEPS["SGD"]()
    step.note, step.net.note, step.optimizer.note = "s", ["n"], "o"  # type: ignore[attr-defined]
    twin = make_copy(step)
    assert (twin.note, twin.net.note, twin.optimizer.note) == ("s", ["n"], "o")
    assert twin.net.note is not step.net.note


def test_an_optimizer_copied_alone() -> None:
    """A shallow copy belongs to the same network, with a state of its own; a deep one to a network that nobody has."""
    net, optimizer = network(), Adam(0.01)
    gradients = net.value_and_grad(*random_batch(net, 12))[1]
    for fresh in (copy.copy(optimizer), copy.deepcopy(optimizer)):  # before there is a network
        other = network()
        fresh.step(other, gradients)
        assert optimizer.state == {} and optimizer.step_count == 0
    optimizer.step(net, gradients)
    before = {name: array.copy() for name, array in optimizer.state.items()}
    twin = copy.copy(optimizer)
    twin.step(net, gradients)
    assert (optimizer.step_count, twin.step_count) == (1, 2)
    for name, array in optimizer.state.items():
        np.testing.assert_array_equal(array, before[name])
    for alone in (copy.deepcopy(optimizer), pickled(optimizer)):
        with pytest.raises(OptionError, match=r"belongs to another network.*copy\.deepcopy\(\(net, optimizer\)\)"):
            alone.step(net, gradients)


# --- gradients


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", ["value_and_grad", "per_sample_grad", "inputs alone"])
def test_parts_of_copied_gradients_are_views_of_theirs(kind: str, make_copy: Any) -> None:
    net = network()
    x, y = random_batch(net, 5)
    if kind == "value_and_grad":
        gradients = net.value_and_grad(x, y, need_input_grad=True)[1]
    elif kind == "per_sample_grad":
        gradients = net.per_sample_grad(x, y)
    else:
        gradients = net.vjp(x)[1](np.ones((5, 3)), need_theta_grad=False, need_input_grad=True)
    twin = make_copy(gradients)
    if gradients.inputs is not None:
        np.testing.assert_array_equal(twin.inputs, gradients.inputs)
    if kind == "inputs alone":
        assert twin.theta is None and not twin.weights
        return
    assert np.shares_memory(twin.theta, gradients.theta) == (make_copy is copy.copy)
    twin.theta[...] = 7
    for part, its in zip((*twin.weights, *twin.biases), (*gradients.weights, *gradients.biases), strict=True):
        assert (part == 7).all() and part.shape == its.shape
    if kind == "value_and_grad":
        net.value_and_grad(x, y, out=twin)
        np.testing.assert_array_equal(twin.theta, net.value_and_grad(x, y)[1].theta)


@pytest.mark.numpy_only
def test_gradients_of_a_users_own_parts_keep_them() -> None:
    parts = np.ones((2, 3)), np.ones(2)
    for theta in (np.zeros(8), np.zeros(3), None):
        twin = copy.deepcopy(gpuback.Gradients(theta, (parts[0],), (parts[1],)))
        assert (twin.weights[0] == 1).all() and (twin.biases[0] == 1).all()
        assert (theta is None) == (twin.theta is None)


# --- pullbacks


def test_a_pullback_refuses_to_be_copied(recwarn: pytest.WarningsRecorder) -> None:
    net = network(loss="squared_error")
    x, dy = random_batch(net, 5)[0], np.ones((5, 3))
    _, pullback = net.vjp(x)
    for held in (pullback, net.taylor(x, np.ones((1, 4)))):
        for refused in (copy.deepcopy, pickled):
            with pytest.raises(CopyError, match="copy the network, and make the call again"):
                refused(held)
        assert copy.copy(held) is held
    np.testing.assert_array_equal(copy.copy(pullback)(dy).theta, pullback(dy).theta)
    gc.collect()
    assert not recwarn, "nothing half made has been left to a finalizer"


# --- networks


@pytest.mark.numpy_only
def test_what_is_made_anew_for_a_copy_is_all_of_a_network() -> None:
    from gpuback._network import mlp
    from gpuback._training import train_step

    net, step = network(), STEPS["SGD"]()
    assert set(vars(net)) == mlp._MADE_ANEW
    names = {"_net", "_optimizer", "_clip_norm", "_micro_batch_size", "_loss_scaling", "_loss_scale"}
    assert set(vars(step)) == names | train_step._MADE_ANEW


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches a GPU on and off: backend="cupy" is the emulator."""
    from support.requirements import require_emulator

    require_emulator()
    from emulator import EmulatorLauncher, StrictNumpy

    from gpuback._backends.cuda.ops import CudaOps

    launcher = EmulatorLauncher("random", copies="random", resident_blocks=3)
    ops = CudaOps(StrictNumpy(launcher), launcher, name="cupy")

    def switch(on: bool) -> None:
        backend = Backend(lambda reproducible: ops, lambda: BackendStatus(on, "there is no GPU" if not on else "on"))
        monkeypatch.setitem(gpuback._backends.registry.BACKENDS, "cupy", backend)

    switch(True)
    return switch


@pytest.mark.numpy_only
def test_what_was_pickled_on_a_gpu_goes_on_without(gpu: Callable[[bool], None]) -> None:
    step = TrainStep(network(backend="cupy", dtype="float64"), Adam(0.01), clip_norm=0.1)
    x, y = random_batch(step.net, 12)
    for _ in range(3):
        step(x, y)
    content, expected = pickle.dumps(step), step.net.forward(x)
    assert pickle.loads(content).net.backend == "cupy"
    gpu(False)
    with pytest.warns(RuntimeWarning, match="pickled on backend 'cupy', which cannot be used here: there is no GPU"):
        twin = pickle.loads(content)
    assert twin.net.backend == "numpy" and twin.optimizer.step_count == 3
    np.testing.assert_allclose(twin.net.forward(x), expected, rtol=1e-13)
    with pytest.raises(BackendError):
        twin.net.to("cupy")
    twin(x, y)
    gpu(True)
    step(x, y)
    np.testing.assert_allclose(twin.net.theta, step.net.theta, rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = pickled(twin)  # what went on with NumPy stays there
    assert back.net.backend == "numpy"


@pytest.mark.numpy_only
def test_an_unknown_backend_is_one_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(backend="numpy")
    monkeypatch.setattr(type(net.ops), "name", "abacus")
    content = pickle.dumps(net)
    monkeypatch.undo()
    with pytest.warns(RuntimeWarning, match="'abacus'.*there is none of that name"):
        assert pickle.loads(content).backend == "numpy"


# --- everything else that is public


@functools.cache
def examples() -> dict[str, Any]:
    """An object of each public class that holds something."""
    net = network(backend="numpy")
    x, y = random_batch(net, 30)
    return {
        "MLP": net,
        "Gradients": net.value_and_grad(x, y)[1],
        "GradientReport": gpuback.check_gradients(net, x, y),
        "History": gpuback.fit(network(backend="numpy"), x, y, epochs=2, seed=0, validation=0.2),
        "LossScaling": LossScaling(8.0, 3),
        "SGD": SGD(0.1, 0.9, trainable=[True, False, True]),
        "Adam": Adam(0.1, multipliers=[1, (1, 2), 1]),
        "AdamW": AdamW(0.1, decay_biases=False),
        "TrainStep": TrainStep(network(backend="numpy"), Adam(0.1), clip_norm=1.0),
        "CudaForms": gpuback.CudaForms("exp_of(-x * x)", "-2 * x * exp_of(-x * x)"),
        "BackendStatus": gpuback.backends()["numpy"],
        "Trace": net.trace(x, y),
        "Explanation": net.explain(30),
        "Architecture": net.architecture,
        "LayerCase": random_layer(np.random.default_rng(0), 5, 4, 3),
        "schedule": schedules.warmup(schedules.cosine(0.1, 9), 3),
        **{
            name: getattr(losses, name)(**options)
            for name, options in {
                "CrossEntropy": {"label_smoothing": 0.1, "class_weight": [1, 2, 3]},
                "BinaryCrossEntropy": {},
                "SquaredError": {},
                "AbsoluteError": {},
                "Huber": {"delta": 2.0},
                "Quantile": {"q": [0.1, 0.9]},
                "Poisson": {},
            }.items()
        },
    }


NOT_TO_COPY = {"Pullback", "SecondPullback", "Taylor", "DivergedError", "GpubackError"}
"""Tested above, and errors, which have tests of their own."""


def leaves(value: Any) -> Iterator[Any]:
    """What an object holds, as far as it can be compared."""
    if isinstance(value, TrainStep):
        yield state_of(value)
    elif isinstance(value, MLP):
        yield repr(value), value.theta.tobytes()
    elif isinstance(value, np.ndarray):
        yield value.dtype.str, value.shape, value.tobytes()
    elif isinstance(value, dict):
        for key in sorted(value):
            yield key
            yield from leaves(value[key])
    elif isinstance(value, (list, tuple)):
        yield type(value)
        for item in value:
            yield from leaves(item)
    elif dataclasses.is_dataclass(value):
        yield from leaves({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif hasattr(value, "__dict__") and not callable(value) and type(value).__module__.startswith("gpuback"):
        yield from leaves({name: part for name, part in vars(value).items() if not name.startswith("_")})
    else:
        yield repr(value)


@pytest.mark.numpy_only
@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickled])
def test_every_public_object_is_copied_with_what_it_holds(make_copy: Any) -> None:
    for name, value in examples().items():
        twin = make_copy(value)
        assert type(twin) is type(value)
        assert list(leaves(twin)) == list(leaves(value)), name


@pytest.mark.numpy_only
def test_no_public_class_is_left_out() -> None:
    classes = {name for name, value in vars(gpuback).items() if inspect.isclass(value) and not name.startswith("_")}
    assert classes <= set(examples()) | NOT_TO_COPY
    kinds = {name for name, value in vars(losses).items() if inspect.isclass(value)}
    assert kinds - {"Loss"} <= set(examples())
