"""Contestants, with an adapter for each library that tells how it runs a case."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.cases import Case
from benchmarks.cases import LeftOutError as LeftOutError

OURS = "gpuback"
"""The contestant that the others are compared with."""

Role = Literal["ours", "peer", "floor", "mode"]
"""gpuback; another library; the lower bound; gpuback with an option that costs time."""


def nothing() -> None:
    """Do nothing, for contestants that need no wait or restart."""


@dataclass
class Contestant:
    """A case as one library does it, ready to run.

    Attributes:
        call: the work, once. It may return before the work is done.
        check: does the work from the case's beginning and returns its results by name, for the oracle to check.
        setting: threads and flags that it runs with.
        wait: returns when all work is done.
        restart: returns to the case's beginning, so that training does not go on for ever.
        sets: on a GPU, how many sets of buffers calls take in turn, so that none finds its operands in the cache.
        choices: settings by name, of which the fastest is taken; each takes effect when it is called.
        graph: on a GPU, the library that captures the calls in a CUDA graph; if empty, they are made one by one.
    """

    call: Callable[[], object]
    check: Callable[[], dict[str, Any]]
    setting: str = ""
    wait: Callable[[], object] = nothing
    restart: Callable[[], object] = nothing
    sets: int = 1
    choices: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    graph: Literal["", "cupy", "torch"] = ""


@dataclass(frozen=True)
class Entry:
    """A contestant as the harness knows it before its library is imported.

    Attributes:
        name: its name in rows.
        adapter: a module with a function `contestant(case, variant)`.
        package: packages that must be importable, with spaces between them.
        families: the kinds of work that it has calls for.
        variant: the adapter's variant.
        environment: variables of its process.
        has_no: families in which readers may expect it, but it has no call.
        corrects_epsilon: form of its Adam; see `oracle.train`.
        checks_itself: whether its network differs from the case's, so that its `check` raises.
        checkout: a folder with the `gpuback` that it imports, instead of this tree's.
    """

    name: str
    role: Role
    adapter: str
    package: str
    families: tuple[str, ...]
    variant: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    has_no: tuple[str, ...] = ()
    corrects_epsilon: bool = True
    checks_itself: bool = False
    checkout: str = ""

    def missing(self) -> str | None:
        """Explain why it cannot take part here; None if it can."""
        names = [name.partition(".")[0] for name in self.package.split()]
        return None if all(map(importlib.util.find_spec, names)) else "not installed"

    @property
    def arguments(self) -> list[str]:
        """Command line for a process of its own; see `made_ready`."""
        return [self.adapter, self.variant]


def made_ready(adapter: str, variant: str, case: Case) -> Contestant:
    """Import the library, and make the contestant for a case."""
    made: Contestant = importlib.import_module(adapter).contestant(case, variant)
    return made


def named(name: str) -> Entry:
    """Find an entry of `CPU` by name."""
    return next(one for one in CPU if one.name == name)


def chosen(
    entries: Sequence[Entry], names: Sequence[str] | None, without: Sequence[str], *, quick: bool
) -> tuple[Entry, ...]:
    """Choose the contestants of a run. A quick run leaves out contestants that PyTorch compiles."""
    return tuple(
        one for one in entries
        if (names is None or one.name in names) and one.name not in without
        and not (quick and "compiled" in one.variant)
    )  # fmt: skip


TRAINING = ("step", "fit", "startup", "memory", "busy", "threads")
LAYERS = ("layer", "loss")

SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}
"""Times that an OpenMP thread of PyTorch's looks for work before it sleeps. The default is 30 times as many: no faster
where nothing else runs, and up to a thousand times slower where something does."""

CPU = (
    Entry(OURS, "ours", f"{__name__}.gpuback_library", "gpuback", (*LAYERS, *TRAINING, "reproducible")),
    Entry("gpuback fresh outputs", "mode", f"{__name__}.gpuback_library", "gpuback", ("layer",), "fresh"),
    Entry("gpuback bound", "mode", f"{__name__}.gpuback_library", "gpuback", ("layer",), "bound"),
    Entry("gpuback vjp", "mode", f"{__name__}.gpuback_library", "gpuback", ("step",), "vjp"),
    Entry(
        "gpuback reproducible",
        "mode",
        f"{__name__}.gpuback_library",
        "gpuback",
        ("reproducible", "busy"),
        "reproducible",
    ),
    Entry(
        "PyTorch eager", "peer", f"{__name__}.pytorch", "torch", (*LAYERS, *TRAINING, "product"), environment=SHORT_SPIN
    ),
    Entry(
        "PyTorch compiled",
        "peer",
        f"{__name__}.pytorch",
        "torch",
        (
            "loss",
            "step",
            "fit",
            "startup",
            "busy",
            "threads",
        ),  # no layer: it does not change products. No memory: compiling takes most
        "compiled",
        SHORT_SPIN,
    ),
    Entry("JAX jit", "peer", f"{__name__}.jax_jit", "jax", (*LAYERS, *TRAINING)),
    Entry(
        "scikit-learn",
        "peer",
        f"{__name__}.scikit_learn",
        "sklearn.neural_network",
        TRAINING,
        has_no=LAYERS,
        corrects_epsilon=False,
    ),
    Entry("plain NumPy", "peer", f"{__name__}.plain_numpy", "numpy", (*LAYERS, *TRAINING)),
    Entry(
        "bare products",
        "floor",
        f"{__name__}.bare_products",
        "numpy",
        ("layer", "step", "reproducible", "busy", "threads", "product", "copy"),
    ),
)

TIMED = ("step", "loss")
"""Families beside layers on a GPU."""

GPU_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""JAX takes three quarters of a GPU's memory otherwise."""

# Contestants in one process, so that they work on the same buffers. They are made ready in this order.
GPU = (
    Entry(OURS, "ours", f"{__name__}.gpu_gpuback", "gpuback", ("layer",), "launch"),
    Entry(OURS, "ours", f"{__name__}.gpu_gpuback", "gpuback", ("step", "reproducible", "device-memory")),
    Entry(OURS, "ours", f"{__name__}.gpu_gpuback", "gpuback", ("loss",)),
    Entry("gpuback.fused_backward", "mode", f"{__name__}.gpu_gpuback", "gpuback", ("layer",), "call"),
    Entry("gpuback graph", "mode", f"{__name__}.gpu_gpuback", "gpuback", ("step",), "captured"),
    Entry(
        "gpuback reproducible", "mode", f"{__name__}.gpu_gpuback", "gpuback", ("reproducible", "device-memory"),
        "reproducible",
    ),
    Entry("PyTorch eager", "peer", f"{__name__}.gpu_pytorch", "torch", ("layer", *TIMED, "device-memory")),
    Entry("PyTorch graph", "peer", f"{__name__}.gpu_pytorch", "torch", ("layer", *TIMED), "captured"),
    Entry(
        "PyTorch compiled", "peer", f"{__name__}.gpu_pytorch", "torch", ("layer", *TIMED), "captured compiled",
    ),
    Entry("CuPy", "peer", f"{__name__}.gpu_cupy", "cupy", ("layer", *TIMED)),
    Entry("nvmath epilogs", "peer", f"{__name__}.gpu_nvmath", "nvmath", ("layer",)),
    Entry("tiny-cuda-nn", "peer", f"{__name__}.gpu_tiny_cuda_nn", "tinycudann torch", ("step",), checks_itself=True),
    Entry("JAX jit", "peer", f"{__name__}.gpu_jax", "jax", ("layer", *TIMED, "device-memory"), environment=GPU_MEMORY),
)  # fmt: skip

# Contestants in fresh processes, for their start.
GPU_STARTS = (
    Entry(OURS, "ours", f"{__name__}.gpuback_library", "gpuback cupy", ("startup",), "cupy"),
    Entry("PyTorch eager", "peer", f"{__name__}.pytorch", "torch", ("startup",), "cuda"),
    Entry("JAX jit", "peer", f"{__name__}.jax_jit", "jax", ("startup",), "cuda", GPU_MEMORY),
    Entry("PyTorch compiled", "peer", f"{__name__}.pytorch", "torch", ("startup",), "cuda compiled"),
)

OUTSIDE = {"cpu": (*LAYERS, *TRAINING), "cuda": ("layer", *TIMED)}
"""Families of contestants from other modules."""


def from_outside(text: str, device: str) -> Entry:
    """Make a contestant from an importable module, "module" or "module:variant". By `LeftOutError` it leaves cases out.

    Raises:
        ValueError: there is no such module.
    """
    module, _, variant = text.partition(":")
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package above it
        found = False
    if not found:
        raise ValueError(f"expected module or module:variant, as in my_kernel:fast; there is no module {module!r}")
    return Entry(text, "peer", module, module, OUTSIDE[device], variant)
