"""Blocks of a batch on threads: the same gradients, BLAS left as it was, errors passed on."""

import os
import threading
import time
import warnings

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

import gpuback
from gpuback._backends.numpy import plans
from gpuback._core import threads
from gpuback._core.threads import Phase, ThreadPool
from gpuback.testing import random_batch, tolerance


@pytest.fixture(autouse=True)
def _every_blas() -> None:
    """Pools know the BLAS libraries that were loaded at their first use. Another test may have loaded SciPy's since."""
    threads._blas.cache_clear()


def blas_settings() -> list[int]:
    return [library.num_threads for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


def test_results_come_in_order_and_blas_is_alone_meanwhile():
    before = blas_settings()
    seen = ThreadPool(3, blas_alone=False).run(lambda index, worker: (index, blas_settings()), 5)
    assert seen == [(index, [1] * len(before)) for index in range(5)]
    assert blas_settings() == before


def test_a_pool_of_one_leaves_blas_its_threads_unless_told():
    assert ThreadPool(1, blas_alone=False).run(lambda index, worker: blas_settings(), 1) == [blas_settings()]
    assert ThreadPool(1, blas_alone=True).run(lambda index, worker: blas_settings(), 1) == [[1] * len(blas_settings())]


def test_pools_in_several_threads_leave_blas_as_it_was():
    before = blas_settings()
    barrier = threading.Barrier(4)

    def task(index, worker):
        barrier.wait(timeout=10)
        return ThreadPool(2, blas_alone=False).run(lambda i, _: 10 * index + i, 2)

    assert ThreadPool(4, blas_alone=False).run(task, 4) == [[10 * i, 10 * i + 1] for i in range(4)]
    assert blas_settings() == before


def test_pools_of_other_threads_than_the_first_keep_blas_alone_too():
    before = blas_settings()
    seen = []
    for _ in range(2):
        thread = threading.Thread(
            target=lambda: seen.extend(ThreadPool(2, blas_alone=False).run(lambda index, worker: blas_settings(), 2))
        )
        thread.start()
        thread.join()
    assert seen == [[1] * len(before)] * 4
    assert blas_settings() == before


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_a_task_raises_is_raised_once_all_have_ended(failing):
    before, ended = blas_settings(), []
    barrier = threading.Barrier(3)

    def task(index, worker):
        barrier.wait(timeout=10)
        ended.append(index)
        if index == failing:
            raise ZeroDivisionError(f"task {index}")

    with pytest.raises(ZeroDivisionError, match=f"task {failing}"):
        ThreadPool(3, blas_alone=True).run(task, 3)
    assert sorted(ended) == [0, 1, 2]
    assert blas_settings() == before


def run_two_phases(workers, counts):
    seen = []

    def note(phase):
        return lambda index, worker: (time.sleep(1e-4), seen.append((phase, index)))

    phases = (
        Phase(note(0), counts[0], lambda: seen.append("then")),
        Phase(note(1), counts[1], lambda: seen.append("end")),
    )
    ThreadPool(workers, blas_alone=True).run_phases(*phases)
    return seen


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_a_phase_begins_when_the_one_before_has_ended(workers):
    for counts in ((1, 1), (5, 3), (2, 7), (3, 0)):
        seen = run_two_phases(workers, counts)
        first = [(0, i) for i in range(counts[0])]
        assert sorted(seen[: counts[0]]) == first
        assert seen[counts[0]] == "then"
        assert sorted(seen[counts[0] + 1 : len(first) + 1 + counts[1]]) == [(1, i) for i in range(counts[1])]
        assert seen[-1] == ("end" if counts[1] else "then")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("failing", ["task", "then"])
def test_no_phase_begins_after_an_error(workers, failing):
    def fail(*_):
        raise ZeroDivisionError

    phases = (
        Phase(fail if failing == "task" else lambda *_: None, 3, fail),
        Phase(lambda *_: pytest.fail("it has begun"), 3),
    )
    with pytest.raises(ZeroDivisionError):
        ThreadPool(workers, blas_alone=True).run_phases(*phases)


def test_no_one_waits_for_a_helper_without_a_task(monkeypatch):
    """The helper never gets to run, as beside other programs that keep the cores busy: the caller does everything."""
    helper = threads._Helper()
    monkeypatch.setattr(helper, "start", lambda job, worker: None)
    monkeypatch.setattr(threads, "_idle", [helper])
    assert ThreadPool(2, blas_alone=True).run(lambda index, worker: worker, 5) == [0] * 5


def test_whoever_is_free_takes_the_next():
    """One worker is held up by its first task until the other has done all the rest."""
    others_done = threading.Event()
    left = list(range(6))

    def task(index, worker):
        if index == 0:
            assert others_done.wait(timeout=10)
        left.remove(index)
        if left == [0]:
            others_done.set()
        return worker

    workers = ThreadPool(2, blas_alone=False).run(task, 6)
    assert workers[1:] == [1 - workers[0]] * 5


def test_after_an_error_nothing_new_is_begun():
    before, begun = blas_settings(), []

    def task(index, worker):
        begun.append(index)
        if index == 0:
            raise ZeroDivisionError
        time.sleep(0.05)

    with pytest.raises(ZeroDivisionError):
        ThreadPool(2, blas_alone=False).run(task, 50)
    assert len(begun) <= 3
    assert blas_settings() == before


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(plans, "blas_threads", lambda: 3)
    monkeypatch.setattr(plans, "WORTH_THREADS", 0)
    monkeypatch.setattr(plans, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(plans, "OPENBLAS_THREADS", 0)


@pytest.mark.parametrize("batch_size", [1500, 4097])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_shared_out_gradients_are_those_of_the_whole_batch(three_threads, dtype, batch_size):
    net = gpuback.MLP([5, 9, 8, 3], activation="tanh", dtype=dtype, seed=0)
    x, y = random_batch(net, batch_size)
    weight = np.random.default_rng(1).uniform(0, 2, batch_size)
    counts, run = [], ThreadPool.run_phases
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadPool, "run_phases", lambda pool, *phases: (counts.append(pool.size), run(pool, *phases)))
        loss, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
        outputs = net.forward(x)
    assert counts == [3, 3]

    t = net.trace(x, y, sample_weight=weight)
    assert abs(loss - t.loss) <= 1e-6 * t.loss
    for k in range(1, 4):
        da, h = t.da[k].astype(np.float64), t.h[k - 1].astype(np.float64)
        for part, exact, size in (
            (gradients.weights[k - 1], da.T @ h, abs(da).T @ abs(h)),
            (gradients.biases[k - 1], da.sum(axis=0), abs(da).sum(axis=0)),
        ):
            # Products of other shapes may round h and da otherwise: a rounding of each operand on top.
            operands = {"float64": 2.0**-50, "float32": 2.0**-20, "bfloat16": 2.0**-7}[dtype]
            assert (abs(part - exact) <= tolerance(size, batch_size, dtype) + operands * size).all()
    np.testing.assert_allclose(outputs, t.output, rtol=0.02 if dtype == "bfloat16" else 1e-5)
    assert gradients.inputs.shape == x.shape

    again = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)[1]
    np.testing.assert_array_equal(again.theta, gradients.theta)
    np.testing.assert_array_equal(again.inputs, gradients.inputs)


def test_accumulate_adds_the_whole_batch_once(three_threads):
    net = gpuback.MLP([5, 9, 3], seed=0)
    x, y = random_batch(net, 1500)
    _, once = net.value_and_grad(x, y)
    _, twice = net.value_and_grad(x, y)
    net.value_and_grad(x, y, out=twice, accumulate=True)
    np.testing.assert_allclose(twice.theta, 2 * once.theta, rtol=1e-5, atol=1e-8)


def test_little_work_is_not_shared(monkeypatch):
    monkeypatch.setattr(ThreadPool, "run_phases", lambda pool, *phases: pytest.fail("it was shared"))
    net = gpuback.MLP([5, 9, 3], seed=0)
    gpuback.TrainStep(net, gpuback.Adam())(*random_batch(net, 100))


def identities(index, worker):
    time.sleep(0.02)
    return threading.get_ident()


def test_threads_are_used_again():
    first, again = (ThreadPool(3, blas_alone=True).run(identities, 3) for _ in range(2))
    assert len(set(first)) == 3
    assert set(first) == set(again)
    assert threading.get_ident() in first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_threads_of_its_own():
    ThreadPool(3, blas_alone=True).run(identities, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if len(set(ThreadPool(3, blas_alone=True).run(identities, 3))) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_a_known_blas_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(threads, "_blas", lambda: ([], []))
    assert threads.blas_threads() == 1
    assert ThreadPool(2, blas_alone=True).run(lambda index, worker: index, 2) == [0, 1]
