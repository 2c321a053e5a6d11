"""The pool of buffers between calls: by key, the newest first, a few of them, for one call at a time."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from gpuback import MLP
from gpuback._network.pool import KEPT_BUFFERS, Pool
from gpuback.testing import random_batch


@dataclass(eq=False)
class Buffers:
    key: object


def test_buffers_come_back_by_key_and_belong_to_one_call() -> None:
    pool, a, b = Pool(), Buffers("a"), Buffers("b")
    assert pool.acquire("a") is None
    pool.release(a)
    pool.release(b)
    assert pool.acquire("a") is a and pool.acquire("a") is None
    assert pool.acquire("b") is b


def test_several_of_a_key_may_be_kept_and_the_newest_comes_first() -> None:
    pool, older, newer = Pool(), Buffers("a"), Buffers("a")
    pool.release(older)
    pool.release(newer)
    assert [pool.acquire("a") for _ in range(3)] == [newer, older, None]


def test_those_released_longest_ago_go() -> None:
    """Looking for one leaves the order of the others as it was."""
    pool, all_of_them = Pool(), [Buffers(i) for i in range(KEPT_BUFFERS + 1)]
    for buffers in all_of_them[:-1]:
        pool.release(buffers)
    pool.release(pool.acquire(0))  # so that 1 is the oldest
    assert pool.acquire("none") is None
    pool.release(all_of_them[-1])
    assert pool.acquire(1) is None
    assert all(pool.acquire(buffers.key) is buffers for buffers in [all_of_them[0], *all_of_them[2:]])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_copies_begin_empty(duplicate) -> None:
    pool = Pool()
    pool.release(Buffers("a"))
    other = duplicate(pool)
    assert other.acquire("a") is None and pool.acquire("a") is not None


def test_no_two_threads_get_the_same() -> None:
    pool, in_use, errors = Pool(), set[int](), list[int]()

    def work() -> None:
        for turn in range(3000):
            buffers = pool.acquire(turn % 3) or Buffers(turn % 3)
            if id(buffers) in in_use or buffers.key != turn % 3:
                errors.append(turn)
            in_use.add(id(buffers))
            in_use.remove(id(buffers))
            pool.release(buffers)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_network_keeps_its_passes_in_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    net = MLP([4, 6, 3], backend="numpy", seed=0)
    x, y = random_batch(net, 5)
    for _ in range(2):
        net.forward(x)
        net.value_and_grad(x, y)
        net.gradient_norms(x, y)
    assert len(net._pool._free) == 2
    (passes,) = net._per_sample_pool._free
    monkeypatch.setattr(passes, "norms", lambda *batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net.gradient_norms(x, y)
    assert not net._per_sample_pool._free  # half written, perhaps
    assert np.isfinite(net.gradient_norms(x, y)).all()
