"""Rows of each part, the most telling first: what is computed, in which process, in how many seconds at most."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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


# ---- Instructions

TESTS = Path("tests/gpu/test_ptx_sm90_on_gpu.py"), Path("tests/gpu/test_ptx_on_gpu.py")
"""From the root of the source tree, where the script begins."""

EVERY_WIDTH = "test_products_of_every_width_and_layout"
WIDTHS = (64, 32, 128, 192, 256, 40, 72, 8)
"""N of products, the ones that others use first."""


def ptx() -> list[Row]:
    """List the tests of sm_90a's instructions by function, products by their N; then those of all others at once."""
    hopper, others = TESTS
    names = re.findall(r"^def (test_\w+)\(\s*\w", hopper.read_text(encoding="utf-8"), re.MULTILINE)
    expressions = [f"{EVERY_WIDTH} and gpu-{n}-" for n in WIDTHS]
    expressions += [name for name in names if name != EVERY_WIDTH]
    run = "instructions.tested"
    found = [Row(chosen, run, {"file": str(hopper), "expression": chosen}) for chosen in expressions]
    return [*found, Row(others.stem, run, {"file": str(others), "expression": ""}, hopper=False, seconds=40.0)]


# ---- Checks

CHECKED_LAYERS: tuple[Shape, ...] = (
    *((4100, 64, 64), (3000, 128, 128), (2500, 256, 256), (1000, 72, 136), (130, 125, 61), (257, 37, 101)),
    *((2100, 200, 300), (1, 64, 64), (65, 8, 250), (300, 600, 520)),
)
LARGE_LAYERS: tuple[Shape, ...] = (
    (4096, 1024, 1000), (9000, 300, 1100), (66_001, 64, 64), (66_001, 128, 200), (8200, 1030, 1024),
)  # fmt: skip
CHECKED_NETWORKS = (
    *(((64,) * 8, 4100), ((64,) * 8, 70), ((64, 64, 10), 1000), ((20, 64, 33, 10), 333), ((32,) * 10, 2000)),
    *(((100, 128, 7), 301), ((64,) * 4, 1), ((64,) * 8, 40_001)),
    *(((784, 256, 128, 10), 500), ((300, 1000, 520, 10), 700)),
)
SEEDS, FEW_SEEDS = 20, 3
"""For layers; few for large ones, whose exact results the CPU computes."""


def checks(
    layers: Iterable[Shape] = CHECKED_LAYERS,
    large_layers: Iterable[Shape] = LARGE_LAYERS,
    networks: Sequence[tuple[Sequence[int], int]] = CHECKED_NETWORKS,
    seeds: int = SEEDS,
) -> list[Row]:
    """List layers backward and forward, and whole networks."""

    def layer(shape: Shape, seeds: int) -> list[Row]:
        return [
            Row(f"{_words(shape)} backward", "gpu_checks.backward", {"shape": shape, "seeds": seeds}),
            Row(f"{_words(shape)} forward", "gpu_checks.forward", {"shape": shape, "seeds": min(seeds, 6)}),
        ]

    found = [row for shape in layers for row in layer(shape, seeds)]
    for sizes, batch in networks:
        arguments = {"sizes": sizes, "batch": batch, "seeds": seeds // 4}
        title = f"network {'-'.join(map(str, sizes))}, B = {batch}"
        found.append(Row(title, "gpu_checks.network", arguments, seconds=30.0))
    sizes, batch = networks[0]
    arguments = {"sizes": sizes, "batch": batch, "seeds": seeds // 4}
    found.append(Row("the first network, db apart", "gpu_checks.network_with_db_apart", arguments, seconds=45.0))
    return found + [row for shape in large_layers for row in layer(shape, min(seeds, FEW_SEEDS))]


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
    peers = "cuBLAS products", "PyTorch graph", "PyTorch eager", "PyTorch compiled"
    return _timed("layer", {_words(shape): shape for shape in shapes}, "gpuback", peers)


def networks(batches: Sequence[int] = BATCHES) -> list[Row]:
    """List steps of seven layers of 64 with Adam."""
    sizes = {f"7 layers of 64, B = {batch}": batch for batch in batches}
    return _timed("step", sizes, "gpuback graph", ("JAX jit", "PyTorch graph", "PyTorch compiled"))


def forward(shapes: Sequence[Shape] = LAYERS[:5]) -> list[Row]:
    """List layers forward, with ReLU."""
    return [
        Row(f"{_words(shape)} forward: {title}", "gpu_forward.timed", {"shape": shape, "name": name}, hopper)
        for title, name, hopper in _contestants("gpuback", ("PyTorch graph",))
        for shape in shapes
    ]


KNOBS = (("CLUSTER", (1, 4)), ("CHAINS_WANTED", (64, 256)))
"""Constants of plans for Hopper, and what to try in place of theirs."""


def knobs(shapes: Sequence[Shape] = LAYERS[:3]) -> list[Row]:
    """List layers with other constants of their plans. Each value of CLUSTER is compiled first."""
    found = []
    for name, value in ((name, value) for name, values in KNOBS for value in values):
        for shape in shapes:
            arguments = {"shape": shape, "constants": {name: value}}
            found.append(Row(f"{_words(shape)}: {name} = {value}", "gpu_times.tuned", arguments))
    return found


def _timed(family: str, sizes: Mapping[str, Any], ours: str, peers: Sequence[str]) -> list[Row]:
    found = []
    for title, name, hopper in _contestants(ours, peers):
        seconds = COMPILING if "compiled" in name else 30.0
        for words, size in sizes.items():
            arguments = {"family": family, "size": size, "name": name}
            found.append(Row(f"{words}: {title}", "gpu_times.timed", arguments, hopper, seconds))
    return found


def _contestants(ours: str, peers: Sequence[str]) -> list[tuple[str, str, bool]]:
    """List title, name, and whether it runs on the kernels for Hopper."""
    return [
        (f"{ours}, for Hopper", ours, True), (f"{ours}, for any GPU", ours, False),
        *((peer, peer, False) for peer in peers),
    ]  # fmt: skip


def _words(shape: Shape) -> str:
    return " × ".join(map(str, shape))


PARTS: dict[str, Callable[[], list[Row]]] = {
    "machine": machine,
    "ptx": ptx,
    "checks": checks,
    "layers": layers,
    "networks": networks,
    "forward": forward,
    "knobs": knobs,
}
