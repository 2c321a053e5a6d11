"""A Launcher whose device is the emulator."""

from __future__ import annotations

import ctypes
import random
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from emulator import structs
from emulator.build import KERNELS
from emulator.copies import EmulatedCopyStream
from emulator.counts import Counts, Tally
from emulator.kernel import Kernel, load_kernel, load_runtime
from emulator.tensor_maps import EmulatedEncoder
from gpuback._cuda.arguments import ArgumentBlock, array_of, is_open, require_names
from gpuback._cuda.launch import Argument, DeviceLimits, Launch, LaunchPlan, Variant

_ONE_AT_A_TIME = threading.Lock()  # the emulator has one device

ORDERS = ("fifo", "lifo", "random")
LANDINGS = ("late", "early", "random")
HOPPER = DeviceLimits((9, 0), 232448, 132)


class EmulationError(Exception):
    """A kernel did what no kernel may; the message says which thread did what, and where."""


class EmulatorLauncher:
    """Runs kernels on NumPy arrays.

    Args:
        order: which of the threads that could run goes on: the one that waits longest, the one that came last, or any.
            Blocks begin in ascending, descending or any order.
        seed: of what is random.
        resident_blocks: how many blocks run at once.
        copies: when asynchronous copies land: late (when they are waited for), early (at once) or either.
        checked: finds races, accesses outside arrays, reads of shared memory that nobody wrote; counts. Slower.
        truncate: tensor cores cut off instead of rounding, as hardware does.
        limits: of the device that is played.
        folder: where the sources of kernels lie.

    Attributes:
        launches: the entry points launched so far, in order; those of a record when it is replayed.
        variants: the variants launched so far.
        replays: how often a record was replayed.
        failed_records: why `record` failed, each time that it did.
    """

    def __init__(
        self,
        order: str = "fifo",
        *,
        seed: int = 0,
        resident_blocks: int = 2,
        copies: str = "late",
        checked: bool = False,
        truncate: bool = False,
        limits: DeviceLimits = HOPPER,
        folder: Path = KERNELS,
    ) -> None:
        for name, value, known in (("order", order, ORDERS), ("copies", copies, LANDINGS)):
            if value not in known:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")
        if resident_blocks < 1:
            raise ValueError(f"resident_blocks {resident_blocks}: at least one block has to run")
        self.limits = limits
        self.launches: list[str] = []
        self.variants: set[Variant] = set()
        self.replays = 0
        self.failed_records: list[str] = []
        self._copies = copies
        self._recording = threading.local()  # `launches`: what is being recorded
        self._folder = folder
        self._tally = Tally()
        self._settings = structs.Settings(
            order=ORDERS.index(order),
            landing=LANDINGS.index(copies),
            resident_blocks=resident_blocks,
            checked=checked,
            truncate=truncate,
            random_state=(seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D) % 2**64 or 1,
        )

    @property
    def counts(self) -> Counts:
        """What kernels did since `reset_counts`. Bytes, atomics and conflicts are counted in checked launches only."""
        return self._tally.counts(self._settings.counters)

    def reset_counts(self) -> None:
        self._settings.counters = structs.Counters()
        self._tally = Tally()

    def address(self, array: np.ndarray) -> int:
        return _address(array)

    def async_reader(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        return array.copy

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """The launches of `work`, none of which runs now. Like a CUDA graph, the record keeps nothing alive."""
        if self.capturing():
            raise EmulationError("a record was begun within another one")
        self._recording.launches = recorded = []
        try:
            work()
        except BaseException as error:
            self.failed_records.append(f"{type(error).__name__}: {error}")
            raise
        finally:
            del self._recording.launches

        def replay() -> None:
            self.replays += 1
            for launch, values in recorded:
                _alive(launch)(*map(_alive, values))

        return replay

    def capturing(self) -> bool:
        return hasattr(self._recording, "launches")

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        if self.capturing():
            raise EmulationError("a copy while launches are recorded")
        assert source.shape == target.shape and source.dtype == target.dtype
        assert source.flags.c_contiguous and target.flags.c_contiguous
        target[...] = source

    def copy_stream(self, slots: int) -> EmulatedCopyStream:
        landings = {
            "early": lambda: True,
            "late": lambda: False,
            "random": partial(random.Random(0).choice, (True, False)),
        }
        return EmulatedCopyStream(slots, landings[self._copies])

    def bind(self, plan: LaunchPlan, /, **arguments: Argument) -> Launch:
        """Lays out a kernel's arguments; see `Launcher.bind`. Refuses arguments that the kernel would misread."""
        self._check_plan(plan)
        kernel = load_kernel(plan.variant, self._folder, self.limits.capability, self._settings.checked)
        if plan.cluster != kernel.entry.cluster:
            raise ValueError(
                f"{plan.variant.entry}: a plan with clusters of {plan.cluster} blocks; "
                f"the kernel is compiled for {kernel.entry.cluster}"
            )
        names = [parameter.name for parameter in kernel.parameters]
        require_names(plan.variant, names, arguments)
        for parameter in kernel.parameters:
            parameter.check(arguments[parameter.name])
        block = ArgumentBlock(names, arguments, _address, EmulatedEncoder())
        description = structs.Launch(
            entry=ctypes.pointer(kernel.entry),
            grid=plan.grid,
            block=plan.block,
            cluster=plan.cluster,
            shared_bytes=plan.shared_bytes,
            arguments=block.pointer,
            settings=ctypes.pointer(self._settings),
        )
        entry = plan.variant.entry
        pointer = ctypes.addressof(description)
        start = load_runtime().emulator_launch
        note, note_variant = self.launches.append, self.variants.add

        def launch(*values: Any) -> None:
            block.fill(values)
            note(entry)
            note_variant(plan.variant)
            with _ONE_AT_A_TIME:
                failed = start(pointer)
            if failed:
                raise EmulationError(_explain(kernel, _filled(names, arguments, values)))

        def checked_launch(*values: Any) -> None:
            filled = _filled(names, arguments, values)
            arrays = _extents(kernel, filled)
            description.arrays = arrays
            description.array_count = len(arrays)
            launch(*values)
            self._tally.add(kernel, filled, arrays)

        run = checked_launch if self._settings.checked else launch
        recording = self._recording

        def launch_or_record(*values: Any) -> None:
            if not hasattr(recording, "launches"):
                run(*values)
            else:
                block.fill(values)
                recording.launches.append((weakref.ref(run), [_held(value) for value in values]))

        # Whatever the description points to lives as long as the launch.
        launch.keeps = (description, block, kernel)
        return launch_or_record

    def _check_plan(self, plan: LaunchPlan) -> None:
        if not 1 <= plan.block <= 1024:
            raise ValueError(f"{plan.variant.entry}: blocks of {plan.block} threads; a device takes 1 to 1024")
        if plan.grid < 1:
            raise ValueError(f"{plan.variant.entry}: a grid of {plan.grid} blocks")
        if plan.variant.wgmma and self.limits.capability != (9, 0):
            raise ValueError(f"{plan.variant.entry}: for Hopper; this device has {self.limits.capability}")
        if plan.grid % plan.cluster:
            raise ValueError(f"{plan.variant.entry}: {plan.grid} blocks in clusters of {plan.cluster}")
        if not 0 <= plan.shared_bytes <= self.limits.shared_bytes:
            raise ValueError(
                f"{plan.variant.entry}: {plan.shared_bytes} bytes of shared memory; "
                f"this device has {self.limits.shared_bytes} for a block"
            )


def _held(value: Any) -> Any:
    """A launch's argument as a record holds it: an array by its address alone."""
    return weakref.ref(value) if isinstance(value, np.ndarray) else value


def _alive(held: Any) -> Any:
    """What a record holds, if it is still there."""
    if not isinstance(held, weakref.ref):
        return held
    value = held()
    if value is None:
        raise EmulationError("a record was replayed whose arrays or launches are gone")
    return value


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _filled(names: Sequence[str], arguments: dict[str, Argument], values: Sequence[Any]) -> list[Any]:
    """The arguments in the order of the parameters, each slot replaced by its value, each map by its array."""
    slots = [name for name, argument in arguments.items() if is_open(argument)]
    filled = arguments | dict.fromkeys(slots) | dict(zip(slots, values, strict=False))
    return [array_of(filled[name]) for name in names]


def _bounds(array: np.ndarray) -> tuple[int, int]:
    """From an array's first byte to one past its last."""
    if array.size == 0:
        return _address(array), _address(array)
    return np.lib.array_utils.byte_bounds(array)


def _extents(kernel: Kernel, arguments: Sequence[Any]) -> ctypes.Array:
    """What a launch may touch: an entry for each parameter, empty for scalars and null pointers."""
    arrays = (structs.Array * len(arguments))()
    for array, parameter, argument in zip(arrays, kernel.parameters, arguments, strict=True):
        if parameter.takes_array and argument is not None:
            array.begin, array.end = _bounds(argument)
            array.writable = argument.flags.writeable if parameter.is_tensor_map else not parameter.is_const
    return arrays


def _explain(kernel: Kernel, arguments: Sequence[Any]) -> str:
    """The failure of the latest launch in words."""
    failure = load_runtime().emulator_failure().contents
    where = [kernel.variant.entry]
    if failure.block >= 0:
        where += [f"block {failure.block}", f"thread {failure.thread}"]
    if failure.code:
        where += kernel.lines([failure.code])
    message = f"{', '.join(where)}: {_with_lines(kernel, failure.message.decode())}"
    return f"{message}: {_place(kernel, arguments, failure.address)}" if failure.address else message


def _with_lines(kernel: Kernel, message: str) -> str:
    """The message with lines of source in place of addresses of code."""
    codes = sorted(set(re.findall(r"\(code (0x\w+)\)", message)))
    for code, line in zip(codes, kernel.lines(int(code, 16) for code in codes), strict=True):
        message = message.replace(f"(code {code})", f"({line})")
    return message


def _place(kernel: Kernel, arguments: Sequence[Any], address: int) -> str:
    """Where an address lies, told by the array that holds it or is nearest to it."""
    nearest: tuple[int, str] | None = None
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        if not parameter.takes_array or argument is None:
            continue
        begin, end = _bounds(argument)
        if begin <= address < end:
            return f"{parameter.name!r} at {_element(argument, address - _address(argument))}"
        distance, words = (begin - address, "before the start") if address < begin else (address - end, "past the end")
        if nearest is None or distance < nearest[0]:
            nearest = distance, f"{distance} bytes {words} of {parameter.name!r}"
    return nearest[1] if nearest and nearest[0] < 1 << 20 else f"address {address:#x}, near no array"


def _element(array: np.ndarray, offset: int) -> str:
    """The index of the element at an offset, where the strides descend as in C; else the offset itself."""
    index, rest = [], offset
    for stride, length in zip(array.strides, array.shape, strict=True):
        position, rest = divmod(rest, stride) if stride > 0 else (-1, rest)
        if not 0 <= position < length:
            return f"byte {offset}"
        index.append(position)
    return f"[{', '.join(map(str, index))}]"
