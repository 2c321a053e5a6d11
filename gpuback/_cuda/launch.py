"""Launches and their arguments as data, the same for a GPU and for the emulator that stands in for one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpuback._core.typing import Array


class Variant(NamedTuple):
    """One compiled kernel.

    Attributes:
        source: a file of kernels/, such as "layer/layer_simt.cu".
        entry: the `extern "C"` function in it.
        defines: macros, each NAME=VALUE, that make the variant.
        tensor_cores: whether it runs on tensor cores.
        wgmma: whether it uses instructions that only sm_90a has.
    """

    source: str
    entry: str
    defines: tuple[str, ...] = ()
    tensor_cores: bool = False
    wgmma: bool = False


class LaunchPlan(NamedTuple):
    """How to launch a variant.

    Attributes:
        variant: what is launched.
        grid: blocks in the grid, a multiple of `cluster`.
        block: threads in a block.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster, which the variant is compiled for.
    """

    variant: Variant
    grid: int
    block: int
    shared_bytes: int = 0
    cluster: int = 1


@dataclass(frozen=True)
class DeviceLimits:
    """The properties of a device that launch plans use.

    Attributes:
        capability: major and minor number, (9, 0) for Hopper.
        shared_bytes: the most dynamic shared memory that one block may have.
        multiprocessors: how many there are.
        wgmma: whether plans may use the kernels for Hopper (`Variant.wgmma`).
    """

    capability: tuple[int, int]
    shared_bytes: int
    multiprocessors: int
    wgmma: bool = False

    @property
    def arch(self) -> str:
        """NVRTC's name for it. The architecture's own features (wgmma) need the suffix a."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if self.capability >= (9, 0) and major < 12 else "")

    @property
    def tensor_cores(self) -> bool:
        """Whether it has cp.async and tensor cores for bfloat16 and TF32."""
        return self.capability >= (8, 0)


class Slot(NamedTuple):
    """A placeholder for an argument that changes from launch to launch: an array, or a scalar if `dtype` is given."""

    dtype: Any = None


class TensorMap(NamedTuple):
    """A matrix in global memory, as copies of boxes (TMA) see it; the kernel's parameter is a `TensorMap`.

    Attributes:
        array: where the matrix begins, or a Slot that an array fills at launch; None for a map of nothing.
        columns, rows: the matrix. Copies read zeros outside it, and write nothing there.
        pitch: elements from one row to the next; in bytes a multiple of 16, as the matrix's address is.
        box: columns and rows that one copy takes.
        dtype: "bfloat16" or "float16".
        swizzle: bytes of a box's row in shared memory over which 16-byte chunks are permuted, 64 or 128.
    """

    array: Any
    columns: int
    rows: int
    pitch: int
    box: tuple[int, int]
    dtype: str
    swizzle: int = 128


Argument = Any
"""An array (passed as the address of its first element), None (a null pointer or map), a NumPy scalar of the type that
the kernel's parameter has, a TensorMap, or a Slot."""

Launch = Callable[..., None]
"""Launches what was bound; takes a value for each Slot, in the order in which the Slots were given."""


class CopyStream(Protocol):
    """Copies from the host to a device, beside the work that is queued there; see `Prefetch` for who calls what."""

    def scope(self) -> AbstractContextManager[object]:
        """Return the context of the thread that copies: the device is current, and so is the copies' stream."""
        ...

    def host_buffer(self, n_bytes: int) -> NDArray[np.uint8]:
        """Make memory on the host that the device copies from by itself."""
        ...

    def wait_for_step(self, slot: int) -> None:
        """Wait until what was queued before the slot's last `release` is over."""
        ...

    def copy(self, source: NDArray[Any], target: Array) -> None:
        """Queue target = source. The source, in a `host_buffer`, may not change until the copy is made."""
        ...

    def record(self, slot: int) -> None:
        """Note that the slot's copies are queued."""
        ...

    def acquire(self, slot: int) -> None:
        """Let the caller's current stream wait for the slot's copies."""
        ...

    def release(self, slot: int) -> None:
        """Note that all that reads the slot's arrays is queued on the caller's current stream."""
        ...

    def follow(self) -> None:
        """Let the copies' stream wait for the caller's current stream."""
        ...


class Launcher(Protocol):
    """The interface of a device that runs kernels: a CUDA device, or the emulator."""

    limits: DeviceLimits

    def bind(self, plan: LaunchPlan, /, **arguments: Argument) -> Launch:
        """Lay out a kernel's arguments for launches. The function that comes back keeps the bound arrays alive.

        Args:
            plan: what to launch, and how.
            arguments: one for each parameter of the kernel, by the name on its KERNEL line; in any order.

        Returns:
            A function that takes the Slots' values, in the order in which the Slots were given, and launches.

        Raises:
            BackendError: a tensor map breaks the rules of copies; of a Slot's array, the launch says so.
            TypeError: a parameter has no argument, an argument no parameter, or one does not fit the other.
        """
        ...

    def address(self, array: Array) -> int:
        """Return where an array's first element lies in the device's memory."""
        ...

    def async_reader(self, array: Array) -> Callable[[], Any]:
        """Return a function that gives a recent copy of the array without waiting, or None before the first arrives."""
        ...

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Return a function that repeats all launches of `work` at once, with the arguments that they have now.

        Nothing runs meanwhile. `work` may only launch: it may not wait, copy, fill or allocate. What its launches read
        and write has to be kept alive as long as the function is called.

        Raises:
            BackendError: the device, or its driver, cannot.
        """
        ...

    def capturing(self) -> bool:
        """Say whether launches are being captured now, by `capture` or by the user, rather than run."""
        ...

    def copy(self, source: Array, target: Array) -> None:
        """Copy target = source, both contiguous, of the same dtype and shape; queued like a launch."""
        ...

    def copy_stream(self, slots: int) -> CopyStream:
        """Return what copies from the host beside the launches, into arrays in so many slots."""
        ...
