"""Ops.prefetch: what is loaded is there when a step has acquired its slot, whatever was done to its source since."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from emulator.copies import EmulatedCopyStream

from gpuback._backends.cuda.prefetch import CudaPrefetch
from gpuback._backends.numpy.prefetch import NumpyPrefetch
from gpuback._backends.protocol import Prefetch
from gpuback._core.growing import GrowingBuffer
from gpuback._core.scratch import CACHE_LINE

PREFETCHES = {
    "numpy": lambda slots: NumpyPrefetch(slots),
    "copies land late": lambda slots: CudaPrefetch(EmulatedCopyStream(slots, lambda: False), np.empty, slots),
    "copies land early": lambda slots: CudaPrefetch(EmulatedCopyStream(slots, lambda: True), np.empty, slots),
}


@pytest.fixture(params=PREFETCHES)
def prefetch(request: pytest.FixtureRequest) -> Prefetch:
    return PREFETCHES[request.param](3)


def batch(rows: int, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    x = np.arange(start, start + rows * 5, dtype=np.float32).reshape(rows, 5)
    return x, np.arange(start, start + rows), x[:, 0].astype(np.float64) if start % 2 else None


def test_slots_hold_batches_of_any_size_until_they_are_loaded_again(prefetch: Prefetch) -> None:
    sizes = [3, 7, 1, 7, 2, 9, 4, 4, 4]
    loaded = {}
    with prefetch.scope():
        prefetch.follow()
        for number, rows in enumerate(sizes):
            slot = number % 3
            if slot in loaded:
                expected, arrays = loaded.pop(slot)
                prefetch.acquire(slot)
                for array, right in zip(arrays, expected, strict=True):
                    np.testing.assert_array_equal(array, right)
                    assert array is None or (array.dtype == right.dtype and array.flags.c_contiguous)
                prefetch.release(slot)
            source = batch(rows, number)
            arrays = prefetch.load(slot, source)
            loaded[slot] = batch(rows, number), arrays
            for array in source:  # whoever gave it writes over it
                if array is not None:
                    array[...] = 99


def test_arrays_that_are_not_contiguous_arrive_as_they_are_read(prefetch: Prefetch) -> None:
    x = np.arange(24.0).reshape(4, 6)[::-1, ::2]
    (array, *_) = prefetch.load(0, (x, None, None))
    prefetch.acquire(0)
    np.testing.assert_array_equal(array, x)


def test_the_emulator_finds_a_step_that_does_not_wait() -> None:
    prefetch = PREFETCHES["copies land late"](1)
    array, labels, _ = prefetch.load(0, batch(3, 1))
    assert np.isnan(array).all() and (labels == -1).all()
    prefetch.acquire(0)
    np.testing.assert_array_equal(array, batch(3, 1)[0])


def test_the_emulator_finds_a_slot_that_is_loaded_too_soon() -> None:
    prefetch = PREFETCHES["copies land late"](1)
    prefetch.load(0, batch(3, 1))
    prefetch.acquire(0)
    with pytest.raises(AssertionError, match="slot 0 is loaded although no step has read it"):
        prefetch.load(0, batch(3, 1))


class DeviceArray:
    """As CuPy's: not NumPy's."""


def test_arrays_on_the_device_stay_there_and_alive_until_their_step_is_over() -> None:
    prefetch = PREFETCHES["copies land late"](2)
    x, y = DeviceArray(), np.arange(3)
    (same, labels, _) = prefetch.load(0, (x, y, None))
    assert same is x and labels is not y
    alive = weakref.ref(x)
    del x, same
    assert alive() is not None
    prefetch.acquire(0)
    prefetch.release(0)
    prefetch.load(0, batch(3, 1))
    assert alive() is None


def test_a_buffer_grows_and_does_not_shrink() -> None:
    made: list[int] = []

    def make(n_bytes: int) -> np.ndarray:
        made.append(n_bytes)
        return np.empty(n_bytes, np.uint8)

    buffer = GrowingBuffer(make)
    float32, float64 = np.dtype(np.float32), np.dtype(np.float64)
    for shape, dtype in [((4, 5), float32), ((4, 5), float32), ((2, 5), float32), ((2, 5), float64), ((6, 5), float32)]:
        view = buffer.view(shape, dtype)
        assert (view.shape, view.dtype, view.flags.c_contiguous) == (shape, dtype, True)
    assert made == [80, 120]


def test_numpys_buffers_start_at_a_cache_line() -> None:
    for array in NumpyPrefetch(1).load(0, batch(3, 1)):
        assert array.ctypes.data % CACHE_LINE == 0
