"""Launch kernels on a CUDA device through CuPy. A bound launch costs a few microseconds."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpuback._core.typing import Array
from gpuback._cuda.arguments import TENSOR_MAP_BYTES, ArgumentBlock, array_of, require_names
from gpuback._cuda.compiler import Compiled, compile_variant, title
from gpuback._cuda.copy_stream import CudaCopyStream
from gpuback._cuda.hopper import SWITCH, require_hopper, switched_on
from gpuback._cuda.launch import Argument, DeviceLimits, Launch, LaunchPlan, Slot, TensorMap, Variant
from gpuback._cuda.sources import flatten, parameter_names
from gpuback._cuda.tensor_maps import DriverEncoder, load_driver
from gpuback.errors import BackendError, DeviceError

# Dynamic shared memory that a block may have without asking: CUDA C++ Programming Guide, "Shared memory" of each
# compute capability.
_SHARED_BYTES_UNASKED = 48 * 1024
_POINTER_BYTES = 8
_DEFAULT_STREAMS = 0, 1  # handles of the legacy default stream


class _Loaded(NamedTuple):
    compiled: Compiled
    parameters: tuple[str, ...]
    kernel: Any  # keeps the module, and with it the pointer, alive
    pointer: int


class CudaLauncher:
    """The launcher of one CUDA device. Kernels run on the stream that is CuPy's current one at each launch.

    A bound launch holds one set of arguments: it is for one thread at a time.

    Args:
        device_id: which device; CuPy's current one by default.
        folder: where the kernels' sources lie; gpuback's kernels by default.

    Raises:
        BackendError: CuPy cannot be imported, or there is no such device; or kernels for Hopper are switched on, and
            the device is another one or its driver too old for them.
        OptionError: the switch has a value that it does not know.
    """

    def __init__(self, device_id: int | None = None, *, folder: Path | None = None) -> None:
        try:
            import cupy
        except ImportError as error:
            raise BackendError(
                f"launching kernels needs CuPy, which cannot be imported ({error}); "
                "pip install '.[cuda12]' or '.[cuda13]' in gpuback's source tree"
            ) from error
        self._cupy = cupy
        self._folder = folder
        runtime = cupy.cuda.runtime
        try:
            self.device_id: int = runtime.getDevice() if device_id is None else operator.index(device_id)
            self._several_devices = runtime.getDeviceCount() > 1
            major, minor = _capability(cupy.cuda.Device(self.device_id).compute_capability)
            self.limits = DeviceLimits(
                capability=(major, minor),
                shared_bytes=self._attribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin),
                multiprocessors=self._attribute(runtime.cudaDevAttrMultiProcessorCount),
            )
        except RuntimeError as error:
            which = "the current CUDA device" if device_id is None else f"CUDA device {device_id}"
            raise BackendError(f"{which} cannot be used: {error}") from error
        if switched_on():
            require_hopper(f"{SWITCH}=1", self.limits, self.device_id, f"unset {SWITCH}")
            load_driver()
            self.limits = replace(self.limits, wgmma=True)
        self._functions: dict[Variant, _Loaded] = {}
        self._shared_bytes: dict[int, int] = {}
        self._lock = threading.Lock()

    def _attribute(self, attribute: int) -> int:
        return int(self._cupy.cuda.runtime.deviceGetAttribute(attribute, self.device_id))

    def bind(self, plan: LaunchPlan, /, **arguments: Argument) -> Launch:
        """Lay out a kernel's arguments; see `Launcher.bind`. The first use of a variant compiles and loads it.

        Args:
            plan: what to launch, and how.
            arguments: by the names of the kernel's parameters. Arrays are CuPy arrays of this device.

        Returns:
            A function that takes the Slots' values and launches. It keeps the bound arrays alive, but not what comes
            through Slots.

        Raises:
            BackendError: the device cannot run the plan; the message says what it lacks.
            DeviceError: an array lies on another device.
            TypeError: the arguments do not fit the kernel's parameters.
        """
        self._require_capability(plan.variant)
        self._require_shared_memory(plan)
        _require_whole_clusters(plan)
        self._require_own(arguments)
        with self._lock, self._cupy.cuda.Device(self.device_id):
            loaded = self._load(plan.variant)
            require_names(plan.variant, loaded.parameters, arguments)
            _require_sizes(plan.variant, loaded, arguments)
            self._prepare(plan, loaded)
        block = ArgumentBlock(loaded.parameters, arguments, operator.attrgetter("data.ptr"), DriverEncoder())
        return self._launch(plan, loaded, block)

    def address(self, array: Array) -> int:
        """Return where an array's first element lies in the device's memory."""
        return int(array.data.ptr)

    def async_reader(self, array: Array) -> Callable[[], Any]:
        """Return a function that gives a recent copy of the array without waiting, or None before the first arrives.

        Each call returns the last complete copy and starts the next.
        """
        cupy = self._cupy
        memory = cupy.cuda.alloc_pinned_memory(array.nbytes)
        host = np.frombuffer(memory, array.dtype, array.size)
        arrived = cupy.cuda.Event(disable_timing=True)
        latest: list[Any] = []

        def look() -> Any:
            if not latest or arrived.done:
                latest[:] = [host.copy()] if latest else [None]
                array.get(out=host, blocking=False)
                arrived.record()
            return latest[0]

        return look

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Capture `work` into a CUDA graph, which is launched on CuPy's current stream; see `Launcher.capture`.

        The device is the current one when it is captured and when it is launched.
        """
        # Capture is CuPy's default, "relaxed": a garbage collection meanwhile may free memory. Streams that wait for
        # the default stream cannot be captured while others use it.
        try:
            stream = self._cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture()
                try:
                    work()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the first error is the one to report
                        stream.end_capture()
                    raise
                launch_graph = stream.end_capture().launch
        except RuntimeError as error:
            raise BackendError(f"CUDA device {self.device_id} could not capture a CUDA graph: {error}") from error

        def replay() -> None:
            try:
                launch_graph()
            except RuntimeError as error:
                raise BackendError(
                    f"a CUDA graph could not be launched on CUDA device {self.device_id}: {error}; an error of an "
                    "earlier launch may show here"
                ) from error

        return replay

    def capturing(self) -> bool:
        """Say whether CuPy's current stream is being captured. The default stream cannot be."""
        stream = self._cupy.cuda.get_current_stream()
        return stream.ptr not in _DEFAULT_STREAMS and bool(stream.is_capturing())

    def copy(self, source: Array, target: Array) -> None:
        """Copy on CuPy's current stream: target = source, both contiguous, of the same dtype and shape."""
        target.data.copy_from_device_async(source.data, target.nbytes)

    def copy_stream(self, slots: int) -> CudaCopyStream:
        """Return what copies from the host on a stream of its own, the same one at each call."""
        with self._cupy.cuda.Device(self.device_id):
            return CudaCopyStream(self._cupy, self.device_id, self._stream_of_copies, slots)

    @functools.cached_property
    def _stream_of_copies(self) -> Any:
        """One for good: CuPy keeps freed memory by stream, and would keep that of streams that are gone."""
        return self._cupy.cuda.Stream(non_blocking=True)

    def _launch(self, plan: LaunchPlan, loaded: _Loaded, block: ArgumentBlock) -> Launch:
        launch_kernel = self._cupy.cuda.driver.launchKernel
        current_stream = self._cupy.cuda.get_current_stream
        fill, pointer, function = block.fill, block.pointer, loaded.pointer
        grid, threads, shared_bytes = plan.grid, plan.block, plan.shared_bytes

        def launch(*values: Any) -> None:
            fill(values)
            try:
                launch_kernel(function, grid, 1, 1, threads, 1, 1, shared_bytes, current_stream().ptr, pointer, 0)
            except RuntimeError as error:
                raise self._refused(plan, "launched", error, loaded) from error

        if not self._several_devices:
            return launch
        current_device, device, device_id = self._cupy.cuda.runtime.getDevice, self._cupy.cuda.Device, self.device_id

        def launch_on_its_device(*values: Any) -> None:
            if current_device() == device_id:
                launch(*values)
            else:
                with device(device_id):
                    launch(*values)

        return launch_on_its_device

    def _load(self, variant: Variant) -> _Loaded:
        """Return the variant's function, which is loaded once."""
        loaded = self._functions.get(variant)
        if loaded is None:
            compiled = compile_variant(variant, self.limits.arch, folder=self._folder)
            parameters = parameter_names(flatten(variant.source, self._folder), variant.entry)
            try:
                kernel = self._cupy.RawModule(path=str(compiled.path)).get_function(variant.entry)
                loaded = _Loaded(compiled, parameters, kernel, kernel.kernel.ptr)
            except RuntimeError as error:
                raise BackendError(
                    f"{title(variant)}, compiled for {self.limits.arch}, cannot be loaded on CUDA device "
                    f"{self.device_id}: {error}; a driver older than the CUDA version of CuPy refuses its kernels: "
                    "update the driver, or install the CuPy for an earlier CUDA"
                ) from error
            self._functions[variant] = loaded
        return loaded

    def _prepare(self, plan: LaunchPlan, loaded: _Loaded) -> None:
        """Raise the function's allowance of dynamic shared memory to what the plan takes; never lower it."""
        static_bytes = loaded.compiled.resources.shared_bytes
        allowed = self._shared_bytes.get(loaded.pointer, _SHARED_BYTES_UNASKED - static_bytes)
        driver = self._cupy.cuda.driver
        try:
            if plan.shared_bytes > allowed:
                driver.funcSetAttribute(
                    loaded.pointer, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, plan.shared_bytes
                )
                self._shared_bytes[loaded.pointer] = plan.shared_bytes
            threads = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, loaded.pointer)
        except RuntimeError as error:
            raise self._refused(plan, "prepared", error, loaded) from error
        if plan.block > threads:
            raise BackendError(
                f"{title(plan.variant)} needs blocks of {plan.block} threads, CUDA device {self.device_id} allows "
                f"{threads} with its {loaded.compiled.resources.registers} registers a thread"
            )

    def _require_capability(self, variant: Variant) -> None:
        if variant.wgmma:
            require_hopper(title(variant), self.limits, self.device_id, "a plan for this device is needed")
        if variant.tensor_cores and not self.limits.tensor_cores:
            major, minor = self.limits.capability
            raise BackendError(
                f"{title(variant)} needs a GPU of compute capability 8.0 or later (tensor cores for bfloat16 and TF32, "
                f"asynchronous copies), CUDA device {self.device_id} has {major}.{minor}; choose dtype='float32' "
                "without allow_tf32, or backend='numpy'"
            )

    def _require_shared_memory(self, plan: LaunchPlan) -> None:
        if plan.shared_bytes > self.limits.shared_bytes:
            raise BackendError(
                f"{title(plan.variant)} needs {plan.shared_bytes} bytes of shared memory for a block, CUDA device "
                f"{self.device_id} has {self.limits.shared_bytes}; a plan for smaller tiles is needed"
            )

    def _require_own(self, arguments: Mapping[str, Argument]) -> None:
        for name, argument in arguments.items():
            device = getattr(getattr(array_of(argument), "device", None), "id", self.device_id)
            if device != self.device_id:
                raise DeviceError(
                    f"kernel argument {name!r}: expected an array on CUDA device {self.device_id}, "
                    f"got one on device {device}"
                )

    def _refused(self, plan: LaunchPlan, done: str, error: RuntimeError, loaded: _Loaded) -> BackendError:
        resources = loaded.compiled.resources
        return BackendError(
            f"{title(plan.variant)} could not be {done} on CUDA device {self.device_id} ({self.limits.arch}): {error}. "
            f"It was to run {plan.grid} blocks of {plan.block} threads with {resources.registers} registers each and "
            f"{resources.shared_bytes} + {plan.shared_bytes} bytes of shared memory of {self.limits.shared_bytes}; an "
            "error of an earlier launch may show here"
        )


def _capability(digits: str) -> tuple[int, int]:
    """Read a capability as CuPy writes it: "90" for 9.0 and "120" for 12.0."""
    return int(digits[:-1]), int(digits[-1])


def _require_whole_clusters(plan: LaunchPlan) -> None:
    if plan.grid % plan.cluster:
        raise BackendError(
            f"{title(plan.variant)} has clusters of {plan.cluster} blocks: expected a grid that is a multiple of "
            f"{plan.cluster}, got {plan.grid} blocks"
        )


def _require_sizes(variant: Variant, loaded: _Loaded, arguments: Mapping[str, Argument]) -> None:
    """Refuse arguments of other sizes than the parameters': a launch would read stray memory."""
    sizes = loaded.compiled.resources.parameter_sizes
    if sizes is None:
        return
    given = [_size(arguments[name]) for name in loaded.parameters]
    for place, (name, size) in enumerate(zip(loaded.parameters, sizes, strict=False)):
        if arguments[name] is None and size == TENSOR_MAP_BYTES:
            given[place] = size  # a null map
    if tuple(given) != sizes:
        raise TypeError(
            f"{title(variant)}: expected {len(sizes)} arguments of {_listed(sizes)} bytes, "
            f"got {len(given)} of {_listed(given)}: {', '.join(loaded.parameters)}"
        )


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes)) or "0"


def _size(argument: Argument) -> int:
    if isinstance(argument, TensorMap):
        return TENSOR_MAP_BYTES
    if isinstance(argument, Slot):
        return _POINTER_BYTES if argument.dtype is None else np.dtype(argument.dtype).itemsize
    return argument.dtype.itemsize if isinstance(argument, np.generic) else _POINTER_BYTES
