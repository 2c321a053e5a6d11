"""What is measured on a GPU, the most important first: a run that is short of time ends before the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.cases import CACHED_START, MANY_CLASSES, NETWORKS, STARTS, Case, Network, startup
from benchmarks.peers import GPU_STARTS

FAMILIES = ("layer", "step", "host", "loss", "device-memory", "reproducible", "startup")

LAYER_DTYPES = ("bfloat16", "float32", "tf32")
STEP_DTYPES = ("float32", "bfloat16")

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

TINY, SMALL, WIDE, NARROW_DEEP = NETWORKS.values()
MORE_BATCHES = (
    *((NARROW_DEEP, 131072), (NARROW_DEEP, 2048), (WIDE, 8192), (WIDE, 128)),
    *((SMALL, 8192), (SMALL, 1024), (TINY, 4096)),
)


def narrow(width: int, batch_size: int) -> Network:
    """Seven layers of one width: what is taken as a whole, in one launch up to 64 and in two at 128."""
    return Network(f"7x{width}:{batch_size}", (width,) * 8, batch_size)


NARROW = narrow(64, 1 << 16)
OTHER_NARROW = (*(narrow(width, 1 << 16) for width in (16, 32, 128)), *(narrow(64, 1 << k) for k in (12, 14)))
MORE_NARROW = tuple(narrow(64, 1 << k) for k in (18, 20))
MORE_LOSSES = (Network("many classes:16384", (64, 1000), 16384), Network("vocabulary", (64, 32000), 1024))

HOST_CALLS = {
    "one bound launch": "launch",
    "fused_backward, outputs given": "call",
    "fused_backward, outputs fresh": "call, outputs fresh",
    "TrainStep": "",
}
"""What a call costs the host: case → gpuback's variant."""

COMPILING = "compiling"
"""What PyTorch takes to compile: ten times as long as all else in a row."""

LEVELS = FIRST, USUAL, MORE = range(3)


def start_of(name: str) -> str:
    """The start of a contestant, as a budget calls it."""
    return f"start of {name}"


GUESSES = {
    **{"layer": 8.0, "step": 15.0, "host": 6.0, "loss": 8.0, "device-memory": 15.0, "reproducible": 8.0},
    **{"startup": 25.0, COMPILING: 15.0},
    **{start_of(one.name): 90.0 if "compiled" in one.variant else 25.0 for one in GPU_STARTS},
}
"""Seconds for a row of a family, or for a part of it, before there was any."""


class Job(NamedTuple):
    """Cases that are measured together: all parts of a start, or one.

    Attributes:
        level: of importance; a quick run takes `FIRST`.
    """

    level: int
    cases: tuple[Case, ...]

    @property
    def family(self) -> str:
        return self.cases[0].family


def jobs(families: Sequence[str] = FAMILIES, *, quick: bool = False) -> list[Job]:
    """The most important first; among equals in the order of `FAMILIES`."""
    found = [job for family in FAMILIES if family in families for job in _JOBS[family]()]
    found.sort(key=lambda job: job.level)
    return [job for job in found if job.level == FIRST] if quick else found


def layer(shape: tuple[int, int, int], dtype: str) -> Case:
    B, n_out, n_in = shape
    return Case("layer", f"{n_in}-{n_out}:{B}", (n_in, n_out), B, dtype)


def step(net: Network, dtype: str, family: str = "step") -> Case:
    unit = "bytes" if family == "device-memory" else "s"
    return Case(family, net.name, net.sizes, net.batch_size, dtype, "Adam", unit=unit)


def loss(net: Network) -> Case:
    return Case("loss", net.name, net.sizes[-1:], net.batch_size)


def host(name: str) -> Case:
    if HOST_CALLS[name]:
        return Case("host", name, (64, 64), 64, "bfloat16")
    return Case("host", name, TINY.sizes, TINY.batch_size, "bfloat16", "Adam")


def _layers() -> Iterator[Job]:
    for level, shapes in zip(LEVELS, (FIRST_LAYERS, USUAL_LAYERS, MORE_LAYERS), strict=True):
        yield from (Job(level, (layer(shape, dtype),)) for dtype in LAYER_DTYPES for shape in shapes)


def _steps() -> Iterator[Job]:
    """All dtypes of a network one after the other: what they must compute is worked out once."""
    for level, networks in ((FIRST, (TINY, WIDE, NARROW)), (USUAL, (SMALL, NARROW_DEEP, *OTHER_NARROW))):
        yield from (Job(level, (step(net, dtype),)) for net in networks for dtype in STEP_DTYPES)
    yield Job(USUAL, (step(WIDE, "tf32"),))
    others = (Network(f"{net.name}:{batch_size}", net.sizes, batch_size) for net, batch_size in MORE_BATCHES)
    for other in (*MORE_NARROW, *others):
        yield from (Job(MORE, (step(other, dtype),)) for dtype in STEP_DTYPES)


def _host() -> Iterator[Job]:
    return (Job(FIRST, (host(name),)) for name in HOST_CALLS)


def _losses() -> Iterator[Job]:
    for level, networks in zip(LEVELS, ((NARROW_DEEP,), (TINY, MANY_CLASSES), MORE_LOSSES), strict=True):
        yield from (Job(level, (loss(net),)) for net in networks)


def _memory() -> Iterator[Job]:
    for level, networks in ((FIRST, (WIDE,)), (USUAL, (NARROW_DEEP,))):
        yield from (Job(level, (step(net, dtype, "device-memory"),)) for net in networks for dtype in STEP_DTYPES)


def _reproducible() -> Iterator[Job]:
    for level, networks in ((FIRST, (TINY,)), (USUAL, (SMALL, WIDE, NARROW_DEEP))):
        yield from (Job(level, (step(net, "float32", "reproducible"),)) for net in networks)


def _startup() -> Iterator[Job]:
    return iter([Job(USUAL, tuple(startup(TINY, (*STARTS, CACHED_START), "float32")))])


_JOBS = {
    "layer": _layers,
    "step": _steps,
    "host": _host,
    "loss": _losses,
    "device-memory": _memory,
    "reproducible": _reproducible,
    "startup": _startup,
}
