"""The cases of a run: the usual ones of its device, or those of given networks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from benchmarks.cases import DIGITS, MANY_CLASSES, NETWORKS, Case, Network

Device = Literal["cpu", "cuda"]

FAMILIES: dict[Device, tuple[str, ...]] = {
    "cpu": ("layer", "loss", "step", "fit", "reproducible", "startup", "memory", "busy", "threads"),
    "cuda": ("layer", "step", "host", "loss", "device-memory", "reproducible", "startup"),
}

ON_REQUEST = ("busy", "threads")
"""Families that a run measures only if they are named."""

LAYER_DTYPES = ("bfloat16", "float32", "tf32")
STEP_DTYPES = ("float32", "bfloat16")

DTYPES: dict[Device, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(FAMILIES["cpu"], ("float32",)),
    "cuda": {
        **dict.fromkeys(FAMILIES["cuda"], ("float32",)),
        **{"layer": LAYER_DTYPES, "step": STEP_DTYPES, "device-memory": STEP_DTYPES, "host": ("bfloat16",)},
    },
}
"""Dtypes of a family's operands, unless others are asked for."""

MORE_DTYPES: dict[Device, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(FAMILIES["cpu"], ("float64",)),
    "cuda": {"step": ("tf32",), "host": ("float32", "tf32")},
}
"""Further dtypes, measured only when asked for."""

STARTS = ("import", "network", "first step")
CACHED_START = "first step, kernels cached"
"""On a GPU, where the other first step compiles the kernels."""

HOST_CALLS = {
    "one bound launch": "launch",
    "fused_backward, outputs given": "call",
    "fused_backward, outputs fresh": "call, outputs fresh",
    "TrainStep": "",
}
"""Calls whose cost on the host is measured → gpuback's variant."""

MIDDLING = (Network("tiny:1024", (64, 64, 64, 10), 1024), Network("middling", (256, 256, 256, 10), 512))
"""Further networks in "busy": their products are just large enough for threads."""

LEVELS = FIRST, USUAL, MORE = range(3)


class Job(NamedTuple):
    """Cases that are measured together: all parts of a start, or one case.

    Attributes:
        level: importance, `FIRST` before `USUAL`. A run that is short of time ends before the rest.
    """

    level: int
    cases: tuple[Case, ...]

    @property
    def family(self) -> str:
        return self.cases[0].family


def jobs(
    device: Device,
    families: Sequence[str] | None = None,
    networks: Sequence[Network] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    quick: bool = False,
    beside: int | None = None,
    threads: Sequence[int] | None = None,
) -> list[Job]:
    """List the jobs, the most important first; among equals in the order of `FAMILIES`.

    Args:
        device: "cpu" or "cuda".
        families: some of the device's; by default all.
        networks: networks in place of the usual ones.
        dtypes: some of `dtypes_of` each family; by default `DTYPES`. A family that has none of them is left out.
        quick: whether to list only jobs of level `FIRST`.
        beside: busy processes of the family "busy"; by default as many as cores.
        threads: counts of the family "threads"; by default 1, 2, 4, … up to the cores.
    """
    counts = Counts(beside or usable_cores(), tuple(threads or powers_of_two(usable_cores())))
    found: list[Job] = []
    for family in FAMILIES[device]:
        if families is not None and family not in families:
            continue
        if device == "cuda" and networks is None:
            found += [job for job in _GPU_JOBS[family]() if dtypes is None or job.cases[0].dtype in dtypes]
            continue
        # All dtypes of a network come one after the other, so that their exact results are computed once.
        for cases in _cases(device, family, networks, counts):
            for dtype in dtypes or DTYPES[device][family]:
                if dtype in dtypes_of(device, family):
                    found.append(Job(FIRST, tuple(dataclasses.replace(case, dtype=dtype) for case in cases)))
    found.sort(key=lambda job: job.level)
    return [job for job in found if job.level == FIRST] if quick else found


def dtypes_of(device: Device, family: str) -> tuple[str, ...]:
    """List all dtypes that a family can be measured in."""
    return (*DTYPES[device][family], *MORE_DTYPES[device].get(family, ()))


# ---- Cases of networks


class Counts(NamedTuple):
    """Busy processes, and numbers of threads, that steps are measured with."""

    beside: int
    threads: tuple[int, ...]


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def powers_of_two(most: int) -> list[int]:
    """List 1, 2, 4, … and the last number itself."""
    return [*(1 << k for k in range(most.bit_length()) if 1 << k < most), most]


def _cases(device: Device, family: str, networks: Sequence[Network] | None, counts: Counts) -> Iterator[list[Case]]:
    """Yield the cases of each job. On a CPU each family has its own usual networks."""
    match family:
        case "layer":
            yield from ([largest_layer(net)] for net in networks or NETWORKS.values())
            if not networks:
                yield from ([layer(shape, "float32")] for shape in SMALL_LAYERS)
        case "loss":
            yield from ([loss(net)] for net in networks or (NETWORKS["narrow-deep"], MANY_CLASSES))
        case "step":
            optimizers = ("Adam", "SGD") if device == "cpu" else ("Adam",)
            for net in networks or NETWORKS.values():
                yield from ([training(net, "step", optimizer)] for optimizer in optimizers)
        case "fit":
            yield from ([fit(net)] for net in networks or (DIGITS,))
        case "reproducible":
            yield from ([training(net, "reproducible")] for net in networks or NETWORKS.values())
        case "busy":
            for net in networks or (*NETWORKS.values(), *MIDDLING):
                yield busy(net, counts.beside)
        case "threads":
            for net in networks or NETWORKS.values():
                step = training(net, "threads", "SGD")
                yield [dataclasses.replace(step, threads=count) for count in counts.threads]
        case "startup":
            parts = (*STARTS, CACHED_START) if device == "cuda" else STARTS
            yield from (startup(net, parts) for net in networks or (NETWORKS["tiny"],))
        case "memory" | "device-memory":
            yield from ([memory(net, family)] for net in networks or (NETWORKS["narrow-deep"],))
        case "host":
            for net in networks or ():
                yield from ([host(name, net)] for name in HOST_CALLS)


def largest_layer(net: Network) -> Case:
    """Pick the layer with the most work, except the first, which passes no gradient down."""
    sizes = max(list(pairwise(net.sizes))[1:] or [net.sizes[:2]], key=lambda widths: widths[0] * widths[1])
    return Case("layer", net.name, sizes, net.batch_size)


def loss(net: Network) -> Case:
    return Case("loss", net.name, net.sizes[-1:], net.batch_size)


def training(net: Network, family: str, optimizer: str = "Adam", dtype: str = "float32") -> Case:
    return Case(family, net.name, net.sizes, net.batch_size, dtype, optimizer)


def fit(net: Network) -> Case:
    """Make the case of `fit`, with 14 batches an epoch, as many as 1797 digits make."""
    return dataclasses.replace(training(net, "fit"), samples=14 * net.batch_size, epochs=10)


def busy(net: Network, beside: int) -> list[Case]:
    """Make the cases of a step in quiet and beside busy processes, two percentiles of each."""
    step = training(net, "busy", "SGD")
    return [
        dataclasses.replace(step, beside=count, percentile=percentile)
        for count in (0, beside)
        for percentile in (50, 95)
    ]


def startup(net: Network, parts: Sequence[str]) -> list[Case]:
    return [dataclasses.replace(training(net, "startup"), name=part) for part in parts]


def memory(net: Network, family: str, dtype: str = "float32") -> Case:
    return dataclasses.replace(training(net, family, dtype=dtype), unit="bytes")


def host(name: str, net: Network | None = None) -> Case:
    """Make a case of `HOST_CALLS`, of the smallest sizes unless a network is given."""
    if not HOST_CALLS[name]:
        return dataclasses.replace(training(net or NETWORKS["tiny"], "host", dtype="bfloat16"), name=name)
    one = largest_layer(net) if net else Case("", "", (64, 64), 64)
    return Case("host", name, one.sizes, one.batch_size, "bfloat16")


# ---- The usual cases on a GPU

Shapes = tuple[tuple[int, int, int], ...]

# B, nO, nI
FIRST_LAYERS: Shapes = ((65536, 64, 64), (8192, 1024, 1024), (256, 512, 512))
USUAL_LAYERS: Shapes = (
    *((65536, 128, 128), (65536, 256, 256), (8192, 4096, 4096)),
    *((1000, 72, 136), (4096, 64, 64), (4096, 128, 128)),
)
MORE_LAYERS: Shapes = (
    *((262144, 64, 64), (262144, 128, 128), (16384, 512, 512), (2048, 2048, 2048), (256, 4096, 4096)),
    *((8192, 8192, 8192), (65536, 1024, 1024), (256, 64, 64)),
)

SMALL_LAYERS: Shapes = (
    *((128, 10, 64), (1, 64, 64), (32, 32, 32), (256, 64, 64)),
    *((1024, 256, 256), (4096, 256, 784)),
)
"""On a CPU, where a call's own cost shows: the README's example, one sample, and up to what only products limit."""

TINY, SMALL, WIDE, NARROW_DEEP = NETWORKS.values()
MORE_BATCHES = (
    *((NARROW_DEEP, 131072), (NARROW_DEEP, 2048), (WIDE, 8192), (WIDE, 128)),
    *((SMALL, 8192), (SMALL, 1024), (TINY, 4096)),
)


def narrow(width: int, batch_size: int) -> Network:
    """Make a network of seven layers of one width. A whole step takes one launch up to 64 and two at 128."""
    return Network(f"7x{width}:{batch_size}", (width,) * 8, batch_size)


NARROW = narrow(64, 1 << 16)
OTHER_NARROW = (*(narrow(width, 1 << 16) for width in (16, 32, 128)), *(narrow(64, 1 << k) for k in (12, 14)))
MORE_NARROW = tuple(narrow(64, 1 << k) for k in (18, 20))
MORE_LOSSES = (Network("many classes:16384", (64, 1000), 16384), Network("vocabulary", (64, 32000), 1024))


def layer(shape: tuple[int, int, int], dtype: str) -> Case:
    """Make the case of a layer of a shape (B, nO, nI)."""
    B, n_out, n_in = shape
    return Case("layer", f"{n_in}-{n_out}:{B}", (n_in, n_out), B, dtype)


def _layers() -> Iterator[Job]:
    for level, shapes in zip(LEVELS, (FIRST_LAYERS, USUAL_LAYERS, MORE_LAYERS), strict=True):
        yield from (Job(level, (layer(shape, dtype),)) for dtype in LAYER_DTYPES for shape in shapes)


def _steps() -> Iterator[Job]:
    for level, networks in ((FIRST, (TINY, WIDE, NARROW)), (USUAL, (SMALL, NARROW_DEEP, *OTHER_NARROW))):
        yield from (Job(level, (training(net, "step", dtype=dtype),)) for net in networks for dtype in STEP_DTYPES)
    yield Job(USUAL, (training(WIDE, "step", dtype="tf32"),))
    others = (Network(f"{net.name}:{batch_size}", net.sizes, batch_size) for net, batch_size in MORE_BATCHES)
    for other in (*MORE_NARROW, *others):
        yield from (Job(MORE, (training(other, "step", dtype=dtype),)) for dtype in STEP_DTYPES)


def _host() -> Iterator[Job]:
    return (Job(FIRST, (host(name),)) for name in HOST_CALLS)


def _losses() -> Iterator[Job]:
    for level, networks in zip(LEVELS, ((NARROW_DEEP,), (TINY, MANY_CLASSES), MORE_LOSSES), strict=True):
        yield from (Job(level, (loss(net),)) for net in networks)


def _memory() -> Iterator[Job]:
    for level, networks in ((FIRST, (WIDE,)), (USUAL, (NARROW_DEEP,))):
        yield from (Job(level, (memory(net, "device-memory", dtype),)) for net in networks for dtype in STEP_DTYPES)


def _reproducible() -> Iterator[Job]:
    for level, networks in ((FIRST, (TINY,)), (USUAL, (SMALL, WIDE, NARROW_DEEP))):
        yield from (Job(level, (training(net, "reproducible"),)) for net in networks)


def _startup() -> Iterator[Job]:
    return iter([Job(USUAL, tuple(startup(TINY, (*STARTS, CACHED_START))))])


_GPU_JOBS = {
    "layer": _layers,
    "step": _steps,
    "host": _host,
    "loss": _losses,
    "device-memory": _memory,
    "reproducible": _reproducible,
    "startup": _startup,
}
