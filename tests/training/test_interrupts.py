"""Real SIGINTs while steps are made, and forks beside them: θ, the optimizer and BLAS's threads are as promised."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

import gpuback
from gpuback._backends.numpy import plans, updates
from gpuback._core import interrupts

pytestmark = [
    pytest.mark.numpy_only,
    pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals"),
]

CASES = {
    "one thread": ((64, 64, 64, 10), 64),
    "two phases": ((784, 256, 128, 10), 128),
    "blocks": ((64, 64, 64, 10), 4096),
}
STEPS = 40
INTERRUPTS = int(os.environ.get("GPUBACK_TEST_INTERRUPTS", "12"))
FORKS = int(os.environ.get("GPUBACK_TEST_FORKS", "10"))


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "blas_threads", lambda: 2)


def blas_settings() -> list[int]:
    return [library.num_threads for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


def batch(case: str) -> tuple[np.ndarray, np.ndarray]:
    sizes, rows = CASES[case]
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, sizes[0])).astype(np.float32), rng.integers(0, sizes[-1], rows)


def training(case: str, clip_norm: float | None = None) -> gpuback.TrainStep:
    net = gpuback.MLP(CASES[case][0], backend="numpy", seed=0)
    return gpuback.TrainStep(net, gpuback.Adam(0.01), clip_norm=clip_norm)


def states(step: gpuback.TrainStep) -> list[np.ndarray]:
    return [step.net.theta.copy(), *(array.copy() for array in step.optimizer.state.values())]


@pytest.mark.thorough
@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_after_ctrl_c_a_step_is_made_or_not(case: str, clip_norm: float | None) -> None:
    """θ, the optimizer's state and its count of steps are those after a whole number of steps."""
    x, y = batch(case)
    step, before = training(case, clip_norm), blas_settings()
    expected, started = [states(step)], time.perf_counter()
    for _ in range(STEPS):
        step(x, y)
        expected.append(states(step))
    duration = (time.perf_counter() - started) / STEPS
    made = set()
    for seed in range(INTERRUPTS):
        step, delay = training(case, clip_norm), random.Random(seed).uniform(0, (STEPS - 10) * duration)
        striking = threading.Timer(delay, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            striking.start()
            while True:
                step(x, y)
        striking.join()
        assert blas_settings() == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        made.add(step.optimizer.step_count)
        if step.optimizer.step_count <= STEPS:
            for found, wanted in zip(states(step), expected[step.optimizer.step_count], strict=True):
                np.testing.assert_array_equal(found, wanted)
        step(x, y)  # and training goes on
    assert len(made) > 3


def test_a_handler_that_does_not_raise_lets_the_step_be_made() -> None:
    """E.g. one that asks to stop after this epoch."""
    x, y = batch("two phases")
    step, twin = training("two phases"), training("two phases")
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        for _ in range(5):
            timer = threading.Timer(1e-3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.start()
            step(x, y)
            timer.join()
            twin(x, y)
            time.sleep(1e-3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT] * 5
    np.testing.assert_array_equal(step.net.theta, twin.net.theta)


def test_sigint_is_put_off_to_the_end() -> None:
    order = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts.Deferred() as outer:
            with interrupts.Deferred():
                signal.raise_signal(signal.SIGINT)
                order.append("inner")
            order.append("outer")
        order.append("never")
    assert order == ["inner", "outer"]
    assert outer.ends_work
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigint_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.Deferred():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def _no_warning_of_forks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        yield


def ended(child: int) -> int:
    """Wait for a child and return its exit code, −1 if it hangs."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(1e-3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.thorough
@pytest.mark.usefixtures("_no_warning_of_forks")
@pytest.mark.parametrize("case", CASES)
def test_a_fork_beside_a_thread_that_trains(case: str) -> None:
    """The child finds BLAS and the threads as at rest, and trains to the same bits."""
    x, y = batch(case)
    step, before, stop = training(case), blas_settings(), threading.Event()
    for _ in range(3):
        step(x, y)
    expected = step.net.theta

    def train() -> None:
        other = training(case)
        while not stop.is_set():
            other(x, y)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for seed in range(FORKS):
            time.sleep(random.Random(seed).uniform(0, 3e-3))
            child = os.fork()
            if child == 0:
                code = 9
                try:
                    code = int(blas_settings() != before)
                    own = training(case)
                    for _ in range(3):
                        own(x, y)
                    code += 2 * (own.net.theta.tobytes() != expected.tobytes()) + 4 * (blas_settings() != before)
                finally:
                    os._exit(code)
            assert ended(child) == 0
    finally:
        stop.set()
        thread.join()


def test_an_interrupt_in_a_check_for_finiteness_leaves_blas_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes just when BLAS has been told to use one thread."""
    from gpuback._core import threads

    step, before = training("one thread"), blas_settings()
    x, y = batch("one thread")
    step(x, y)
    for library in threads._blas()[1]:
        real = library.set_threads

        def strike(count: int, real: Callable[[int], None] = real) -> None:
            real(count)
            if count == 1:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(library, "set_threads", strike)
    large = np.ones(20_000, np.float32)
    with pytest.raises(KeyboardInterrupt):
        updates.all_finite(large)
    monkeypatch.undo()
    assert blas_settings() == before
    assert updates.all_finite(large)


@pytest.mark.usefixtures("_no_warning_of_forks")
def test_a_forked_child_goes_on_with_the_step_that_another_thread_was_in() -> None:
    class Waiting:
        """A loss that holds its step up."""

        __name__ = "waiting"
        inside, go_on = threading.Event(), threading.Event()

        def __call__(self, y_hat: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            self.inside.set()
            self.go_on.wait(20)
            return ((y_hat - y) ** 2).sum(axis=1) / 2, y_hat - y

    loss = Waiting()
    step = gpuback.TrainStep(gpuback.MLP([2, 3, 1], loss=loss, backend="numpy", seed=0), gpuback.Adam())
    thread = threading.Thread(target=step, args=(np.ones((4, 2)), np.ones((4, 1))))
    thread.start()
    loss.inside.wait(20)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            loss.go_on.set()
            step(np.ones((4, 2)), np.ones((4, 1)))
            code = 0
        finally:
            os._exit(code)
    loss.go_on.set()
    thread.join()
    assert ended(child) == 0


def test_a_handler_of_the_users_gets_a_frame() -> None:
    frames = []
    before = signal.signal(signal.SIGINT, lambda number, frame: frames.append(frame))
    try:
        with interrupts.Deferred():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [frame.f_code.co_name for frame in frames] == ["test_a_handler_of_the_users_gets_a_frame"]


@pytest.mark.usefixtures("_no_warning_of_forks")
def test_a_fork_by_another_thread_while_sigint_is_put_off() -> None:
    """In the child, nobody would put the handler back."""
    codes = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(int(signal.getsignal(signal.SIGINT) is not signal.default_int_handler))
        codes.append(ended(child))

    with interrupts.Deferred():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert codes == [0]


@pytest.mark.thorough
@pytest.mark.parametrize("start", ["python -m", "gpuback"])
def test_ctrl_c_while_the_command_line_starts(start: str, tmp_path: Path) -> None:
    """One line, and the exit code of an interrupted process, from the package's first import on."""
    script = (
        "import sys; sys.argv[0] = '/usr/bin/gpuback'\nfrom gpuback._cli.main import main\nsys.exit(main(['info']))"
    )
    arguments = ["-m", "gpuback", "info"] if start == "python -m" else ["-c", script]
    # It strikes at imports: the first of gpuback, one in the middle, one of the command line's own.
    for module in ("gpuback._core", "gpuback._training.fit", "gpuback._cli.app", "rich"):
        strike = (
            "import os, signal, sys\n"
            "class Strike:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
            "sys.meta_path.insert(0, Strike())\n"
        )
        folder = tmp_path / module
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(strike, encoding="utf-8")
        path = os.pathsep.join([str(folder), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "gpuback: interrupted\n")
