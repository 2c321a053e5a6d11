"""Rows of each part, the most telling first: what is computed, in which process, in how many seconds at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, int, int]
"""B, nO, nI."""


@dataclass(frozen=True)
class Row:
    """One check or measurement.

    Attributes:
        title: what it is, for people.
        do: the function that makes it, `module.function` of `benchmarks.hopper`.
        arguments: the function's, as JSON has them.
        hopper: whether plans may use the kernels for Hopper.
        seconds: after which its process is killed.
    """

    title: str
    do: str
    arguments: dict[str, Any] = field(default_factory=dict)
    hopper: bool = True
    seconds: float = 20.0


# ---- The machine


def machine() -> list[Row]:
    return [
        Row("clusters that fit", "machine.clusters", {"sizes": [4, 8, 16], "shared_bytes": 229_472, "threads": 384}),
        Row("ceilings", "machine.ceilings", hopper=False, seconds=30.0),
    ]


# ---- Checks

CHECKED_LAYERS: tuple[Shape, ...] = (
    *((4100, 64, 64), (3000, 128, 128), (2500, 256, 256), (1000, 72, 136), (130, 125, 61), (257, 37, 101)),
    *((2100, 200, 300), (1, 64, 64), (65, 8, 250), (300, 600, 520), (4096, 1024, 1000), (9000, 300, 1100)),
)
MANY_ROWS: tuple[Shape, ...] = ((66_001, 64, 64), (66_001, 128, 200), (8200, 1030, 1024))
CHECKED_NETWORKS = (
    *(((64,) * 8, 4100), ((64,) * 8, 70), ((64, 64, 10), 1000), ((20, 64, 33, 10), 333), ((32,) * 10, 2000)),
    *(((100, 128, 7), 301), ((784, 256, 128, 10), 500), ((300, 1000, 520, 10), 700)),
)
SEEDS, FEW_SEEDS = 20, 2


def checks(
    layers: Iterable[Shape] = CHECKED_LAYERS,
    many_rows: Iterable[Shape] = MANY_ROWS,
    networks: Iterable[tuple[Sequence[int], int]] = CHECKED_NETWORKS,
    seeds: int = SEEDS,
) -> list[Row]:
    """List layers backward and forward, and whole networks."""

    def layer(shape: Shape, seeds: int) -> list[Row]:
        named = " × ".join(map(str, shape))
        return [
            Row(f"{named} backward", "checks.backward", {"shape": shape, "seeds": seeds}),
            Row(f"{named} forward", "checks.forward", {"shape": shape, "seeds": min(seeds, 6)}),
        ]

    found = [row for shape in layers for row in layer(shape, seeds)]
    for sizes, batch in networks:
        named = "-".join(map(str, sizes))
        found.append(
            Row(
                f"network {named}, B = {batch}", "checks.network", {"sizes": sizes, "batch": batch, "seeds": seeds // 4}
            )
        )
    return found + [row for shape in many_rows for row in layer(shape, min(seeds, FEW_SEEDS))]


# ---- Times

LAYERS: tuple[Shape, ...] = (
    *((65536, 64, 64), (65536, 128, 128), (65536, 256, 256), (8192, 1024, 1024), (8192, 4096, 4096)),
    *((1000, 72, 136), (256, 512, 512)),
)
BATCHES = tuple(1 << k for k in (16, 12, 14, 18, 20))
COMPILING = 60.0
"""Seconds that PyTorch may take to compile and be measured."""


def layers(shapes: Sequence[Shape] = LAYERS) -> list[Row]:
    """List layers: gpuback's first, what PyTorch compiles last."""
    return _timed(
        shapes,
        lambda shape: (" × ".join(map(str, shape)), {"family": "layer", "size": shape}),
        ours="gpuback",
        peers=("cuBLAS products", "PyTorch graph", "PyTorch eager", "PyTorch compiled"),
    )


def networks(batches: Sequence[int] = BATCHES) -> list[Row]:
    """List steps of seven layers of 64 with Adam."""
    return _timed(
        batches,
        lambda batch: (f"7 layers of 64, B = {batch}", {"family": "step", "size": batch}),
        ours="gpuback graph",
        peers=("JAX jit", "PyTorch graph", "PyTorch compiled"),
    )


def _timed(
    sizes: Sequence[Any], described: Callable[[Any], tuple[str, dict[str, Any]]], ours: str, peers: Sequence[str]
) -> list[Row]:
    found = []
    for name, hopper in ((ours, True), (ours, False), *((peer, False) for peer in peers)):
        for size in sizes:
            title, arguments = described(size)
            switch = {True: ", for Hopper", False: ", for any GPU"}[hopper] if name == ours else ""
            seconds = COMPILING if "compiled" in name else 30.0
            row = Row(f"{title}: {name}{switch}", "timing.timed", {**arguments, "name": name}, hopper, seconds)
            found.append(row)
    return found


PARTS: dict[str, Callable[[], list[Row]]] = {
    "machine": machine,
    "checks": checks,
    "layers": layers,
    "networks": networks,
}
