"""Steps of training as CUDA graphs on a real GPU: the bits of launches one by one, whatever is done between steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.gpu_networks import OPTIMIZERS, each_dtype, twins
from support.layer_calls import DTYPES
from support.requirements import require_gpu

from gpuback import SGD, Adam, TrainStep, fit
from gpuback._network.inputs import as_batch
from gpuback._training.graph_replay import StepGraphs
from gpuback.testing import random_batch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cupy() -> Any:
    require_gpu()
    import cupy

    return cupy


def pair(optimizer: str, dtype: str = "float32", clip_norm: float | None = None, **options: Any) -> list[TrainStep]:
    """The same training by graphs and launch by launch."""
    steps = []
    for _ in range(2):
        net = twins((20, 150, 40, 5), dtype, **{"activation": "gelu"} | options)[1]
        steps.append(TrainStep(net, OPTIMIZERS[optimizer](), clip_norm=clip_norm))
    steps[1]._graphs = None
    return steps


def assert_equal(steps: list[TrainStep], graphs: int) -> None:
    """So many kinds of batches were recorded, and bits are equal."""
    first, second = (
        [step.net.theta.get().tobytes(), *(state.get().tobytes() for state in step.optimizer.state.values())]
        for step in steps
    )
    assert first == second
    assert len({(step.optimizer.step_count, step.diverged_at) for step in steps}) == 1
    assert steps[0]._graphs is not None and steps[0]._graphs.failure is None
    assert sum(record.replay is not None for record in steps[0]._graphs._steps.values()) == graphs


@each_dtype
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_the_bits_are_those_of_launches_one_by_one(clip_norm: float | None, optimizer: str, dtype: str) -> None:
    """With schedules, two sizes of batches, with weights and without, and θ written to in between."""
    steps = pair(optimizer, dtype, clip_norm)
    rng = np.random.default_rng(0)
    for turn in range(16):
        rows = 200 - 77 * (turn % 2)
        x, y = random_batch(steps[0].net, rows, turn)
        weight = rng.uniform(0.1, 2.0, rows) if turn % 4 < 2 else None
        losses = []
        for step in steps:
            step.optimizer.learning_rate *= 0.9
            if turn == 9:
                step.net.weights[0][...] *= 0.5
            if turn == 13:
                step.clip_norm = 0.01
            losses.append(step(x, y, weight))
        assert losses[0].get().tobytes() == losses[1].get().tobytes()
    assert_equal(steps, graphs=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_batches_of_a_graph(dtype: str) -> None:
    """Several splits, and kernels with more shared memory than is given unasked."""
    steps = pair("AdamW", dtype)
    for turn in range(6):
        batch = random_batch(steps[0].net, 20_001, turn)
        assert len({step(*batch).get().tobytes() for step in steps}) == 1
    assert_equal(steps, graphs=1)


def test_losses_are_fresh() -> None:
    step = pair("SGD")[0]
    x, y = random_batch(step.net, 100)
    losses = [step(x, y) for _ in range(50)]
    values = [float(loss) for loss in losses]
    assert len(set(values)) == 50 and len({loss.data.ptr for loss in losses}) == 50


def test_on_any_stream(cupy: Any) -> None:
    """The queue is long before any of it has run: copies to a graph's memory wait for the graph before."""
    steps = pair("Adam")
    batches = [random_batch(steps[0].net, 100, turn) for turn in range(40)]
    batches = [(cupy.asarray(x, np.float32), cupy.asarray(y)) for x, y in batches]
    cupy.cuda.runtime.deviceSynchronize()
    streams = [cupy.cuda.Stream.null, cupy.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)]
    losses: list[list[Any]] = []
    for step in steps:
        losses.append([])
        for stream in [*streams, *streams]:
            with stream:
                losses[-1] += [step(*batch) for batch in batches]
                stream.synchronize()
    assert [float(loss) for loss in losses[0]] == [float(loss) for loss in losses[1]]
    assert_equal(steps, graphs=1)


@pytest.mark.parametrize("stop_after_nonfinite", [False, True])
def test_steps_that_are_not_finite_are_not_made(stop_after_nonfinite: bool) -> None:
    steps = pair("Adam", clip_norm=1.0)
    for turn in range(8):
        x, y = random_batch(steps[0].net, 100, turn)
        if turn == 5:
            x[3, 1] = np.nan
        for step in steps:
            step._step(
                *as_batch(x, y, None, step.net.architecture, step.net.ops), stop_after_nonfinite=stop_after_nonfinite
            )
    assert_equal(steps, graphs=1)
    assert steps[0].diverged_at == 5 and steps[0].optimizer.step_count == (5 if stop_after_nonfinite else 7)
    assert np.isfinite(steps[0].net.theta.get()).all()


@pytest.mark.parametrize("repeated_before", [False, True])
def test_within_a_graph_of_the_users_own(repeated_before: bool, cupy: Any) -> None:
    steps = pair("Adam", clip_norm=0.5)
    x, y = random_batch(steps[0].net, 100)
    batch = as_batch(x, y, None, steps[0].net.architecture, steps[0].net.ops)
    for _ in range(4 if repeated_before else 1):  # compiles and lays out what a capture cannot
        for step in steps:
            step._step(*batch)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        loss = steps[0]._step(*batch)
        graph = stream.end_capture()
        for _ in range(5):
            graph.launch(stream)
        stream.synchronize()
    assert [float(steps[1]._step(*batch)) for _ in range(5)][-1] == float(loss)
    assert_equal(steps, graphs=int(repeated_before))
    for _ in range(4):
        assert float(steps[0]._step(*batch)) == float(steps[1]._step(*batch))
    assert_equal(steps, graphs=1)


def test_a_capture_that_fails_leaves_everything_usable(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pair("SGD")
    update: Any = steps[0].optimizer._update
    launch = update.launch

    def waits(*arguments: Any) -> None:
        launch(*arguments)
        if steps[0].net.ops.graph_capture.capturing():
            cupy.cuda.get_current_stream().synchronize()  # is forbidden, and ends a capture

    monkeypatch.setattr(update, "launch", waits)
    for turn in range(5):
        batch = random_batch(steps[0].net, 100, turn)
        assert float(steps[0](*batch)) == float(steps[1](*batch))
    graphs = steps[0]._graphs
    assert graphs is not None
    reason, graphs.failure = graphs.failure, None
    assert reason is not None and "could not record a CUDA graph" in reason
    assert_equal(steps, graphs=0)


def test_two_runs_of_one_network_and_their_memory(cupy: Any) -> None:
    """What a run has recorded goes with it."""
    net = twins((20, 150, 40, 5), "float32")[1]
    x, y = random_batch(net, 5000)
    pool = cupy.get_default_memory_pool()

    def train() -> int:
        first, second = TrainStep(net, Adam(0.01)), TrainStep(net, SGD(0.1))
        for _ in range(5):
            assert np.isfinite(float(first(x, y))) and np.isfinite(float(second(x, y)))
        del first, second
        return int(pool.used_bytes())

    train()  # makes the network's passes
    assert len({train() for _ in range(4)}) == 1


def test_fit_reads_batches_where_it_gathers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [twins((20, 150, 5), "float32")[1] for _ in range(2)]
    x, y = random_batch(nets[0], 500)
    histories = [fit(nets[0], x, y, optimizer=Adam(0.01), epochs=4, batch_size=64, seed=0)]
    monkeypatch.setattr(StepGraphs, "maybe_capture", lambda *_: None)
    histories.append(fit(nets[1], x, y, optimizer=Adam(0.01), epochs=4, batch_size=64, seed=0))
    assert histories[0].loss == histories[1].loss
    assert nets[0].theta.get().tobytes() == nets[1].theta.get().tobytes()
