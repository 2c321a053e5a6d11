"""Batches from an iterable, taken, checked and copied two ahead of the step that reads them, on a thread of their own.

Two queues carry slots in a circle. The loading thread takes a free slot, loads a batch into it and passes it on; the
stepping thread, `fit`'s, makes a step on it and gives the slot back. With three slots, no more than two batches are
ahead of the one that is trained on. Between epochs the loading thread waits, since callbacks may change what the next
epoch is to be.
"""

from __future__ import annotations

import contextvars
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np

from gpuback._backends.numpy.ops import NumpyOps
from gpuback._core.typing import Array, ArrayLike
from gpuback._core.validation import count_or_none
from gpuback._network.mlp import MLP
from gpuback._training.batches import Samples, in_words, validation_pair
from gpuback._training.sources import is_auto
from gpuback.errors import DataError, GpubackError, OptionError

AHEAD = 2
"""Batches that are loaded before the step on the one before them is over."""

SHORT_STEP = 1e-3
"""Seconds. After a shorter step the loading thread sleeps on as long as `AHEAD` batches are ready: waking it at every
step cost steps of 90 µs another 12 µs."""

BatchLike: TypeAlias = Sequence[ArrayLike]
"""(x, y) or (x, y, sample_weight)."""

BatchesLike: TypeAlias = Iterable[BatchLike] | Callable[[int], Iterable[BatchLike]]
"""An iterable of batches, or a function from an epoch's number to one."""

REMEDIES = "a function of the epoch's number that returns an iterable, or a list or the like"


def require_batches_alone(
    *,
    x: object,
    y: object,
    sample_weight: object,
    batch_size: object,
    shuffle: bool | None,
    seed: int | None,
) -> None:
    """Raise OptionError for an option of `fit` that is about arrays in memory."""
    given = {
        "x": x is not None,
        "y": y is not None,
        "sample_weight": sample_weight is not None,
        "batch_size": not is_auto(batch_size),
        "shuffle": bool(shuffle),
        "seed": seed is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise OptionError(
                f"{name}: expected none with batches=, which have sizes, weights and an order of their own"
            )


class Stream:
    """The batches that an iterable gives; see `gpuback._training.sources.Source`.

    Args:
        net, batches, steps_per_epoch, validation: as `fit`'s.
        epochs: how many are to be trained.
        resume: whether a checkpoint may be gone on from.

    Raises:
        OptionError: `batches` is nothing to iterate over, an iterator that cannot be what is asked for, or another
            option is out of range.
    """

    def __init__(
        self,
        net: MLP,
        batches: BatchesLike,
        steps_per_epoch: int | None,
        validation: float | Sequence[ArrayLike] | None,
        *,
        epochs: int,
        resume: bool,
    ) -> None:
        self._steps = count_or_none("steps_per_epoch", steps_per_epoch)
        if _is_iterable(batches):
            iterable: Any = batches
            if isinstance(iterable, Iterator):  # iter() is not asked: that of a DataLoader draws random numbers
                self._require_usable_iterator(epochs, resume)
            self._open: Callable[[int], Iterable[BatchLike]] = lambda epoch: iterable
            self._length = _length(iterable) if self._steps is None else self._steps
        elif callable(batches):
            self._open, self._length = batches, self._steps
        else:
            raise OptionError(
                "batches: expected an iterable of (x, y) or (x, y, sample_weight), or a function from an epoch's "
                f"number to one, got {type(batches).__name__}"
            )
        self._net = net
        self._validation = None
        if validation is not None:
            expected = "(x, y), since nothing can be held out of batches="
            self._validation = validation_pair(net, validation, expected)
        self._prefetch = net.ops.prefetch(AHEAD + 1)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._epochs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[tuple[int, Samples] | BaseException | None] = queue.SimpleQueue()
        for slot in range(AHEAD + 1):
            self._free.put(slot)

    def _require_usable_iterator(self, epochs: int, resume: bool) -> None:
        if self._steps is None and epochs > 1:
            raise OptionError(
                f"batches: an iterator can be gone through once, which makes one of {epochs} epochs. "
                f"Expected steps_per_epoch= with it, or {REMEDIES}"
            )
        if resume:
            raise OptionError(
                "batches: an iterator does not tell where an earlier run had come to, so resume=True cannot go on "
                f"from there. Expected {REMEDIES}"
            )

    def identity(self) -> dict[str, Any]:
        validation = 0 if self._validation is None else self._validation.digest(self._net.ops)
        return {"data": "batches", "validation": validation, "steps_per_epoch": self._steps}

    def start(self, seed: int) -> tuple[Samples | None, int | None]:
        return self._validation, self._length

    def epoch(self, number: int) -> Iterator[Samples]:
        if self._thread is None:  # the user's code sees the settings of `fit`'s caller, such as np.errstate
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._load_epochs,), name="gpuback batches", daemon=True)
            self._thread.start()
        self._prefetch.follow()
        self._epochs.put(number)
        read: list[int] = []
        while (loaded := self._loaded.get()) is not None:
            if isinstance(loaded, BaseException):
                try:
                    raise loaded
                finally:
                    del loaded  # which refers to this frame
            slot, batch = loaded
            self._prefetch.acquire(slot)
            started = time.perf_counter()
            yield batch
            self._prefetch.release(slot)
            read.append(slot)  # after the last batch, they all go back: no more than the epoch's end is queued
            if self._loaded.qsize() < AHEAD or time.perf_counter() - started > SHORT_STEP:
                for slot in read:
                    self._free.put(slot)
                read.clear()

    def close(self) -> None:
        """End the thread, waiting for the batch that it may be taking."""
        if self._thread is None or self._thread.ident is None:  # it could not be started
            return
        self._closing = True
        self._free.put(0)
        self._epochs.put(None)
        self._thread.join()
        self._prefetch.follow()  # whoever gets the buffers' memory next

    # On the loading thread

    def _load_epochs(self) -> None:
        try:
            with self._prefetch.scope():
                while (epoch := self._epochs.get()) is not None:
                    self._load_epoch(epoch)
                    self._loaded.put(None)
        except BaseException as error:
            self._loaded.put(error)

    def _load_epoch(self, epoch: int) -> None:
        iterator = self._iterator(epoch)
        taken = 0
        try:
            for taken in itertools.count() if self._steps is None else range(self._steps):
                slot = self._free.get()
                if self._closing:
                    return
                try:
                    item = next(iterator)
                except StopIteration:
                    self._free.put(slot)
                    break
                self._loaded.put((slot, self._load(slot, item, taken, epoch)))
                del item
            else:
                return
        finally:
            del iterator  # an error's traceback would keep a generator from ending
        if taken == 0:
            raise DataError(
                f"epoch {epoch}: expected at least one batch, got none"
                + ("" if epoch == 0 else f"; an iterator that is used up? Expected {REMEDIES}")
            )
        if self._steps is not None:
            raise DataError(f"epoch {epoch}: expected steps_per_epoch={self._steps} batches, got {taken}")

    def _iterator(self, epoch: int) -> Iterator[BatchLike]:
        try:
            iterable = self._open(epoch)
        except StopIteration as error:  # which no generator can pass on, such as `epoch` is
            raise DataError(f"batches({epoch}): expected an iterable of batches, got StopIteration") from error
        if not _is_iterable(iterable):
            raise OptionError(f"batches({epoch}): expected an iterable of batches, got {type(iterable).__name__}")
        return iter(iterable)

    def _load(self, slot: int, item: BatchLike, number: int, epoch: int) -> Samples:
        """Check a batch, on the host if its data are there, and copy it to the slot."""
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
            where, came = f"batch {number} of epoch {epoch}", in_words(item)
            raise DataError(f"{where}: expected (x, y) or (x, y, sample_weight), got {came}")
        ops = self._net.ops
        try:
            x, y = ops.to_array(item[0], "x"), ops.to_array(item[1], "y")
            weight = None if len(item) == 2 or item[2] is None else ops.to_array(item[2], "sample_weight")
            on_host = isinstance(x, np.ndarray) and isinstance(y, np.ndarray) and isinstance(weight, np.ndarray | None)
            samples = Samples.checked(self._net, x, y, weight, _HOST if on_host else ops)
            return Samples(*self._prefetch.load(slot, (samples.x, samples.y, samples.weight)))
        except GpubackError as error:
            raise type(error)(f"batch {number} of epoch {epoch}: {error}") from None


class _HostOps(NumpyOps):
    """NumPy's operations to check a batch with: without BLAS, whose threads are the steps', and quick to start."""

    def scope(self, on_invalid: Callable[..., object] | None = None) -> AbstractContextManager[object]:
        return _NO_SCOPE  # comparisons need none

    def all_finite(self, array: Array) -> bool:
        finite = np.isfinite(array)
        return bool(finite.item(finite.argmin()))


_NO_SCOPE = nullcontext()
_HOST = _HostOps()


def _is_iterable(value: object) -> bool:
    return hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")


def _length(batches: Any) -> int | None:
    """Return how many batches there are, for display only; None if they do not say."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):  # a DataLoader has a length only if its data set has
        return None
