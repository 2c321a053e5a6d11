"""Steps of training that are recorded and repeated at once: the emulator's records stand in for CUDA graphs.

Whatever is done between steps, a network trained with records has the bits of one trained launch by launch.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher, StrictNumpy
from support.requirements import require_emulator

import gpuback._backends.registry
from gpuback import MLP, SGD, Adam, AdamW, TrainStep, fit
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.registry import Backend, BackendStatus
from gpuback._network.inputs import as_batch
from gpuback._network.pool import KEPT_BUFFERS
from gpuback._training import graph_replay
from gpuback._training.optimizers import Progress
from gpuback.errors import BackendError, DivergedError
from gpuback.testing import random_batch

require_emulator()

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD(0.1),
    "Nesterov": lambda: SGD(0.05, 0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda: Adam(0.01, weight_decay=0.01),
    "AdamW": lambda: AdamW(0.01),
}
GROUPS: dict[str, dict[str, Any]] = {
    "frozen": {"trainable": [False, (False, True), True], "multipliers": [1, 1, 0.5]},
    "unequal": {"multipliers": [0.1, 1, (1, 2)], "decay_biases": False},
}
NETWORKS = {
    "one layer": {"sizes": (5, 3)},
    "three layers": {"sizes": (7, 33, 12, 5), "activation": ("gelu", "tanh")},
    "regression": {"sizes": (4, 9, 1), "loss": "squared_error", "activation": "silu"},
    "float64": {"sizes": (7, 12, 3), "dtype": "float64"},
    "tf32": {"sizes": (9, 40, 3), "allow_tf32": True},
    "bfloat16": {"sizes": (9, 70, 3), "dtype": "bfloat16"},
    "float16": {"sizes": (3, 20, 2), "dtype": "float16", "loss": "binary_cross_entropy"},
}


class EagerOps(CudaOps):
    """Launch by launch."""

    graph_capture = None  # type: ignore[assignment]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> EmulatorLauncher:
    """That of backend="graphs"; backend="eager" has one of its own."""
    launcher, eager = EmulatorLauncher(), EmulatorLauncher()
    backends = {
        "graphs": CudaOps(StrictNumpy(launcher), launcher, name="graphs", fuse_networks=False),
        "eager": EagerOps(np, eager, name="eager", fuse_networks=False),
    }
    for name, ops in backends.items():
        backend = Backend(lambda reproducible, ops=ops: ops, lambda: BackendStatus(True, "the emulator"))
        monkeypatch.setitem(gpuback._backends.registry.BACKENDS, name, backend)
    return launcher


class Twins:
    """The same training on both backends, step by step."""

    def __init__(self, make_optimizer: Callable[[], Any], clip_norm: float | None = None, **options: Any) -> None:
        options = {"sizes": (7, 12, 5), "seed": 0} | options
        nets = [MLP(backend=backend, **options) for backend in ("graphs", "eager")]
        self.steps = [TrainStep(net, make_optimizer(), clip_norm=clip_norm) for net in nets]

    @property
    def graphs(self) -> graph_replay.StepGraphs:
        assert self.steps[1]._graphs is None
        graphs = self.steps[0]._graphs
        assert graphs is not None
        return graphs

    def batch(self, rows: int, turn: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return random_batch(self.steps[0].net, rows, turn)

    def step(self, *batch: Any) -> None:
        """One step on each, with the same loss."""
        losses = [step(*batch) for step in self.steps]
        assert losses[0].tobytes() == losses[1].tobytes()

    def each(self, change: Callable[[TrainStep], object]) -> None:
        for step in self.steps:
            change(step)

    def assert_equal(self) -> None:
        first, second = (
            [step.net.theta.tobytes(), *(state.tobytes() for state in step.optimizer.state.values())]
            for step in self.steps
        )
        assert first == second
        assert len({step.optimizer.step_count for step in self.steps}) == 1
        assert len({step.diverged_at for step in self.steps}) == 1
        assert len({step.optimizer._update.poll_diverged() for step in self.steps}) == 1
        assert self.graphs.failure is None


CASES = [
    (net, optimizer, (None, 0.05)[(i + j) % 2], bool((i + j // 2) % 2))
    for i, net in enumerate(NETWORKS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize("net, optimizer, clip_norm, weighted", CASES)
def test_the_bits_are_those_of_launches_one_by_one(
    net: str, optimizer: str, clip_norm: float | None, weighted: bool, launcher: EmulatorLauncher
) -> None:
    twins = Twins(OPTIMIZERS[optimizer], clip_norm, **NETWORKS[net])
    for turn in range(5):
        weight = np.random.default_rng(turn).uniform(0.1, 2.0, 19) if weighted else None
        twins.step(*twins.batch(19, turn), weight)
    twins.assert_equal()
    assert launcher.replays == 3  # the first two times it was run, and then recorded


@pytest.mark.parametrize(
    "precision, passes",
    [
        ("float32", [*["forward_simt"] * 3, "loss_rows", *["layer_simt"] * 3]),
        ("bfloat16", ["copy_weights", "copy_rows", *["forward_mma"] * 3, "loss_rows", *["layer_mma_narrow"] * 3]),
    ],
)
def test_a_record_has_the_launches_of_a_step(precision: str, passes: list[str], launcher: EmulatorLauncher) -> None:
    step = TrainStep(MLP((7, 33, 12, 5), dtype=precision, backend="graphs", seed=0), Adam(0.01))
    batch = random_batch(step.net, 10)
    for _ in range(2):
        step(*batch)
    launcher.launches.clear()
    step(*batch)
    assert launcher.replays == 1
    assert launcher.launches == [*passes, "begin_step", "adam"]


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_part_of_a_record(groups: str, launcher: EmulatorLauncher) -> None:
    twins = Twins(lambda: AdamW(0.01, **GROUPS[groups]), **NETWORKS["three layers"])
    for turn in range(4):
        if turn == 3:
            twins.each(lambda step: setattr(step.optimizer, "learning_rate", 0.001))
        twins.step(*twins.batch(19, turn))
    twins.assert_equal()
    assert launcher.replays == 2


@pytest.mark.parametrize(
    "trainable, backward",
    [
        ([True, True, True], ["layer_simt"] * 3),
        ([True, False, False], ["layer_simt"] * 3),
        ([False, (False, True), True], ["layer_simt"] * 2),
        ([False, False, True], ["layer_simt"]),
    ],
)
def test_nothing_is_launched_below_the_lowest_layer_that_is_trained(
    trainable: Any, backward: list[str], launcher: EmulatorLauncher
) -> None:
    step = TrainStep(MLP((7, 33, 12, 5), backend="graphs", seed=0), Adam(0.01, trainable=trainable))
    step(*random_batch(step.net, 10))
    update = "adam" if trainable == [True] * 3 else "adam_in_ranges"
    passes = [*["forward_simt"] * 3, "loss_rows", *backward]
    assert launcher.launches == [*passes, "set_hyper_parameters", "begin_step", update]


def test_losses_belong_to_the_caller(launcher: EmulatorLauncher) -> None:
    step = TrainStep(MLP((7, 12, 5), backend="graphs", seed=0), SGD(0.5))
    batch = random_batch(step.net, 10)
    losses = [step(*batch) for _ in range(6)]
    values = [float(loss) for loss in losses]
    assert launcher.replays == 4 and len(set(values)) == 6 and values == sorted(values, reverse=True)
    assert all(loss.shape == () and loss.flags.owndata for loss in losses)


def set_learning_rate(step: TrainStep) -> None:
    step.optimizer.learning_rate *= 0.7


def set_clip_norm(step: TrainStep) -> None:
    step.clip_norm = None if step.clip_norm == 0.01 else 0.01


def set_decay(step: TrainStep) -> None:
    step.optimizer.weight_decay = 0.1 - step.optimizer.weight_decay


def set_betas(step: TrainStep) -> None:
    step.optimizer.betas = (0.5, 0.9)


def set_theta(step: TrainStep) -> None:
    step.net.theta *= 0.5
    step.net.weights[0][...] = 0.25


def set_state(step: TrainStep) -> None:
    for state in step.optimizer.state.values():
        state += 0.125


def step_by_hand(step: TrainStep) -> None:
    x, y = random_batch(step.net, 11, 77)
    step.optimizer.step(step.net, step.net.value_and_grad(x, y)[1])


@pytest.mark.parametrize(
    "change", [set_learning_rate, set_clip_norm, set_decay, set_betas, set_theta, set_state, step_by_hand]
)
@pytest.mark.parametrize("optimizer", ["Nesterov", "Adam"])
def test_what_changes_between_steps_takes_effect(
    optimizer: str, change: Callable[[TrainStep], object], launcher: EmulatorLauncher
) -> None:
    twins = Twins(OPTIMIZERS[optimizer], 0.2)
    unchanged = Twins(OPTIMIZERS[optimizer], 0.2)
    for turn in range(6):
        if turn > 2:
            twins.each(change)
        for each in (twins, unchanged):
            each.step(*twins.batch(11, turn))
    twins.assert_equal()
    assert launcher.replays == 2 * 4 and len(twins.graphs._steps) == 1
    same = twins.steps[0].net.theta.tobytes() == unchanged.steps[0].net.theta.tobytes()
    assert same == (optimizer == "Nesterov" and change is set_betas)  # SGD has none


@pytest.mark.parametrize(
    "make, name, value",
    [
        (lambda: SGD(0.1, 0.9), "momentum", 0.5),
        (lambda: SGD(0.1, 0.9), "nesterov", True),
        (lambda: SGD(0.1, 0.9, nesterov=True), "nesterov", False),
        (lambda: SGD(0.1), "weight_decay", 0.1),
        (lambda: Adam(0.01), "eps", 0.1),
        (lambda: AdamW(0.01), "betas", (0.5, 0.6)),
        (lambda: AdamW(0.01), "weight_decay", 0.9),
    ],
)
def test_a_record_reads_hyper_parameters_that_are_set_later(
    make: Any, name: str, value: Any, launcher: EmulatorLauncher
) -> None:
    twins, unchanged = Twins(make), Twins(make)
    for turn in range(5):
        if turn == 3:
            twins.each(lambda step: setattr(step.optimizer, name, value))
        for each in (twins, unchanged):
            each.step(*twins.batch(11, turn))
    twins.assert_equal()
    assert launcher.replays == 2 * 3
    assert twins.steps[0].net.theta.tobytes() != unchanged.steps[0].net.theta.tobytes()


def test_momentum_that_comes_later_is_recorded_anew(launcher: EmulatorLauncher) -> None:
    twins = Twins(lambda: SGD(0.1))
    for turn in range(8):
        if turn == 4:
            twins.each(lambda step: setattr(step.optimizer, "momentum", 0.9))
        twins.step(*twins.batch(11, turn))
    twins.assert_equal()
    assert launcher.replays == 2 + 2 and twins.steps[0].optimizer.state["velocity"].any()


def test_a_copy_records_its_own(launcher: EmulatorLauncher) -> None:
    twins = Twins(OPTIMIZERS["Adam"])
    for turn in range(4):
        twins.step(*twins.batch(11, turn))
    copies = copy.deepcopy(twins)
    for turn in range(4, 8):
        copies.step(*twins.batch(11, turn))
    for turn in range(4, 8):
        twins.step(*twins.batch(11, turn))
    twins.assert_equal()
    copies.assert_equal()
    assert copies.steps[0].net.theta.tobytes() == twins.steps[0].net.theta.tobytes()


def test_batches_of_several_kinds_in_turn(launcher: EmulatorLauncher) -> None:
    twins = Twins(OPTIMIZERS["Adam"], 0.5)
    rng = np.random.default_rng(0)
    for turn in range(12):
        x, y = twins.batch((10, 3, 10)[turn % 3], turn)
        rows = rng.dirichlet(np.ones(5), len(y))
        twins.step(x, y)
        twins.step(x, rows)
        twins.step(x, y, rng.uniform(0.5, 2, len(y)))
    twins.assert_equal()
    assert launcher.replays == 3 * (8 - 2 + 4 - 2)
    assert len(twins.graphs._steps) == 6


def test_two_runs_of_one_network_in_turn(launcher: EmulatorLauncher) -> None:
    """They share its passes, but have gradients and updates of their own."""
    first, second = Twins(OPTIMIZERS["Adam"]), Twins(OPTIMIZERS["SGD"])
    others = [TrainStep(step.net, SGD(0.2, 0.5), clip_norm=0.1) for step in first.steps]
    second.steps = others
    for turn in range(5):
        first.step(*first.batch(11, turn))
        second.step(*first.batch(11, turn + 9))
        first.assert_equal()
    second.assert_equal()
    assert launcher.replays == 2 * 3


@pytest.mark.parametrize("stop_after_nonfinite", [False, True])
@pytest.mark.parametrize("bad_turn", [1, 4])
def test_steps_that_are_not_finite_are_not_made(
    stop_after_nonfinite: bool, bad_turn: int, launcher: EmulatorLauncher
) -> None:
    twins = Twins(OPTIMIZERS["Adam"], 1.0)
    for turn in range(7):
        x, y = twins.batch(10, turn)
        if turn == bad_turn:
            x[3, 1] = np.nan
        losses = [
            step._step(
                *as_batch(x, y, None, step.net.architecture, step.net.ops), stop_after_nonfinite=stop_after_nonfinite
            )
            for step in twins.steps
        ]
        assert losses[0].tobytes() == losses[1].tobytes()
        assert math.isnan(losses[0]) == (turn == bad_turn)
    twins.assert_equal()
    assert launcher.replays == 5
    optimizer = twins.steps[0].optimizer
    assert twins.steps[0].diverged_at == optimizer._update.poll_diverged() == bad_turn
    assert optimizer.step_count == (bad_turn if stop_after_nonfinite else 6)
    assert np.isfinite(twins.steps[0].net.theta).all()


def test_fit_has_the_same_bits(launcher: EmulatorLauncher) -> None:
    """With a shorter last batch, whose size comes once an epoch."""
    nets = [MLP((4, 8, 3), backend=backend, seed=0) for backend in ("graphs", "eager")]
    x, y = random_batch(nets[0], 52)
    histories = [
        fit(net, x, y, optimizer=Adam(0.05), epochs=4, batch_size=16, seed=1, validation=(x, y), clip_norm=0.5)
        for net in nets
    ]
    assert histories[0].loss == histories[1].loss and histories[0].validation_loss == histories[1].validation_loss
    assert nets[0].theta.tobytes() == nets[1].theta.tobytes()
    assert launcher.replays == 4 * 4 - 2 - 2 and not launcher.failed_records


def test_fit_tells_the_step_that_diverged(launcher: EmulatorLauncher) -> None:
    caught = []
    for backend in ("graphs", "eager"):
        net = MLP((4, 6, 2), loss="squared_error", backend=backend, seed=0)
        x, y = random_batch(net, 40)
        with pytest.raises(DivergedError) as error:
            fit(net, x, y, optimizer=SGD(1e6), epochs=20, batch_size=8, seed=0)
        caught.append((error.value.step, error.value.epoch, str(error.value), net.theta.tobytes()))
    assert caught[0] == caught[1] and launcher.replays > 0


def test_a_restored_optimizer_is_not_the_recorded_one(launcher: EmulatorLauncher) -> None:
    twins = Twins(OPTIMIZERS["Adam"])
    for turn in range(9):
        if turn == 4:
            for step in twins.steps:
                state = {name: 0.01 * np.arange(len(array)) for name, array in step.optimizer.state.items()}
                step.optimizer._restore(step.net, state, Progress(7))
        twins.step(*twins.batch(11, turn))
    twins.assert_equal()
    assert twins.steps[0].optimizer.step_count == 7 + 5
    assert launcher.replays == 2 + 3


def test_a_batch_that_comes_in_the_same_arrays_is_read_there(launcher: EmulatorLauncher) -> None:
    """As `fit` gathers them. Else it is copied; which of both the first two batches of a kind decide."""
    twins = Twins(OPTIMIZERS["Adam"])
    same, *others = ([*twins.batch(11, turn), np.full(11, 0.5, np.float32)] for turn in range(5))
    batches = [same, same, same, same, *others, same, same]
    for turn, batch in enumerate(batches):
        same[0][...] = twins.batch(11, turn)[0]
        losses = [step._step(*batch) for step in twins.steps]
        assert losses[0].tobytes() == losses[1].tobytes()
        (record,) = twins.graphs._steps.values()
        assert (record.own is None) == (turn < 4)
        assert launcher.replays == (0, 0, 1, 2, 2, 3, 4, 5, 6, 7)[turn]
    twins.assert_equal()


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_array_of_a_batch_is_taken_for_another(changed: int, launcher: EmulatorLauncher) -> None:
    twins = Twins(OPTIMIZERS["SGD"])
    batch = [*twins.batch(11), np.linspace(0.5, 2, 11, dtype=np.float32)]
    for turn in range(6):
        if turn > 2:
            batch[changed] = batch[changed][::-1].copy()
        losses = [step._step(*batch) for step in twins.steps]
        assert losses[0].tobytes() == losses[1].tobytes()
    twins.assert_equal()
    assert launcher.replays == 1 + 2


# ---- What is not recorded


def test_one_of_each_kind_and_large_ones_are_not_recorded(
    launcher: EmulatorLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_replay, "LARGEST_INPUTS", 10 * (7 * 4 + 8))
    twins = Twins(OPTIMIZERS["SGD"])
    for rows in (1, 2, 10, 10, 10, 11, 11, 11):
        twins.step(*twins.batch(rows))
    twins.assert_equal()
    assert launcher.replays == 1 and len(twins.graphs._steps) == 3


def test_records_are_limited_in_number_and_go_with_the_passes(launcher: EmulatorLauncher) -> None:
    twins = Twins(OPTIMIZERS["SGD"])
    for rows in range(1, graph_replay.KEPT_GRAPHS + 4):
        twins.step(*twins.batch(rows))
        twins.step(*twins.batch(rows))
    assert len(twins.graphs._steps) == graph_replay.KEPT_GRAPHS
    gc.collect()
    alive = [record for record in twins.graphs._steps.values() if record.passes() is not None]
    assert len(alive) == KEPT_BUFFERS
    for _ in range(3):
        twins.step(*twins.batch(4))  # of passes that are made anew
    assert launcher.replays == 1
    for rows in range(graph_replay.KEPT_GRAPHS + 1, graph_replay.KEPT_GRAPHS + 4):
        twins.step(*twins.batch(rows))
    assert launcher.replays == 1 + 3
    twins.assert_equal()


@pytest.mark.parametrize("backend", ["numpy", "eager"])
def test_other_backends_go_on_as_ever(backend: str, launcher: EmulatorLauncher) -> None:
    step = TrainStep(MLP((7, 12, 5), backend=backend, seed=0), SGD(0.1))
    assert step.net.ops.graph_capture is None and step._graphs is None


def test_a_graph_of_the_users_own_contains_plain_launches(launcher: EmulatorLauncher) -> None:
    """CUDA: TrainStep is called on a stream that is being captured."""
    launcher_ops = gpuback._backends.registry.BACKENDS["graphs"].make(False)
    launcher_ops.xp = np  # a graph of the user's may allocate
    twins = Twins(OPTIMIZERS["Adam"], 0.5)
    x, y = twins.batch(11)
    batch = as_batch(x, y, None, twins.steps[0].net.architecture, twins.steps[0].net.ops)
    losses: list[Any] = []
    for recorded_before in (False, True):
        losses.clear()
        graph = launcher.capture(lambda: losses.append(twins.steps[0]._step(*batch)))
        before, replays = twins.steps[0].net.theta.tobytes(), launcher.replays
        for turn in range(2):
            batch[0][...] = twins.batch(11, turn)[0]  # the graph reads the user's own array
            graph()
            assert losses[0].tobytes() == twins.steps[1]._step(*batch).tobytes()
        assert launcher.replays == replays + 2 and twins.steps[0].net.theta.tobytes() != before
        twins.assert_equal()
        assert bool(twins.graphs._steps) == recorded_before
        for turn in range(4):
            twins.step(*twins.batch(11, turn))
        twins.assert_equal()
        assert launcher.replays == replays + 2 + (4 if recorded_before else 2)


@pytest.mark.parametrize("error", [BackendError("CUDA_ERROR_OF_SOME_KIND"), MemoryError("no room"), KeyError("bug")])
def test_where_recording_fails_steps_go_on_and_the_reason_is_kept(
    error: Exception, launcher: EmulatorLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins(OPTIMIZERS["Adam"])
    asked = []

    def capture(work: Callable[[], object]) -> None:
        asked.append(work)
        raise error

    monkeypatch.setattr(launcher, "capture", capture)
    for turn in range(5):
        twins.step(*twins.batch(11, turn))
        twins.step(*twins.batch(12, turn))
    reason, twins.graphs.failure = twins.graphs.failure, None
    assert reason == f"{type(error).__name__}: {error}"
    twins.assert_equal()
    assert len(asked) == 1 and launcher.replays == 0


def test_an_interruption_while_recording_is_passed_on(launcher: EmulatorLauncher) -> None:
    twins = Twins(OPTIMIZERS["Adam"])
    twins.step(*twins.batch(11))
    update = twins.steps[0].optimizer._update
    launch, update.launch = update.launch, None
    calls: list[None] = []

    def interrupted(*arguments: Any) -> None:
        if launcher.capturing():
            raise KeyboardInterrupt
        calls.append(launch(*arguments))

    update.launch = interrupted
    batch = twins.batch(11, 1)
    with pytest.raises(KeyboardInterrupt):
        twins.steps[0](*batch)
    assert len(calls) == 1 and not launcher.capturing()  # the step itself had been made
    update.launch = launch
    twins.steps[1](*batch)
    for turn in range(4):
        twins.step(*twins.batch(11, turn))
    twins.assert_equal()


@pytest.mark.parametrize("what", ["empty", "zeros", "copyto", "stack"])
def test_allocations_and_copies_would_be_noticed(
    what: str, launcher: EmulatorLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of NumPy's functions none may be called while a step is recorded; here one is."""
    bind_loss = CudaOps.bind_loss

    def careless(self: CudaOps, *bound: Any) -> Callable[..., Any]:
        run = bind_loss(self, *bound)

        def loss_and_delta(*given: Any) -> Any:
            arguments = {"copyto": (np.zeros(1), 1), "stack": ([np.zeros(1)],)}.get(what, (1,))
            getattr(self.xp, what)(*arguments)
            return run(*given)

        return loss_and_delta

    monkeypatch.setattr(CudaOps, "bind_loss", careless)
    twins = Twins(OPTIMIZERS["SGD"])
    for turn in range(4):
        twins.step(*twins.batch(11, turn))
    assert twins.graphs.failure == f"EmulationError: {what} while launches are recorded"
    assert launcher.replays == 0 and launcher.failed_records == [twins.graphs.failure]


def test_a_loss_that_is_allocated_while_recording_would_be_noticed(
    launcher: EmulatorLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of the emulator's holds no array alive, like a graph."""
    launcher_ops = gpuback._backends.registry.BACKENDS["graphs"].make(False)
    launcher_ops.xp = np
    bind_loss = CudaOps.bind_loss
    monkeypatch.setattr(
        CudaOps, "bind_loss", lambda self, *bound: lambda y, weight, mean=None: bind_loss(self, *bound)(y, weight)
    )
    step = TrainStep(MLP((7, 12, 5), backend="graphs", seed=0), SGD(0.1))
    batch = random_batch(step.net, 10)
    for _ in range(2):
        step(*batch)
    with pytest.raises(EmulationError, match="whose arrays or launches are gone"):
        step(*batch)


@pytest.fixture(autouse=True)
def _no_record_is_left_open(launcher: EmulatorLauncher) -> Iterator[None]:
    yield
    assert not launcher.capturing()
