"""Who takes part: one adapter a library, each of which says how that library does a case."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case
from benchmarks.roles import OURS, Role


def nothing() -> None:
    """For contestants that have nothing to wait for, or to restart."""


@dataclass
class Contestant:
    """A case as one library does it, ready to run.

    Attributes:
        call: the work, once. It may return before it is done.
        check: does the work from the case's beginning; what the oracle is compared with.
        setting: what it runs with.
        wait: returns when all work is done.
        restart: back to the case's beginning, that training stays what it was.
        choices: settings of which the fastest is to be taken, by name; each takes effect when it is called.
    """

    call: Callable[[], object]
    check: Callable[[], dict[str, Any]]
    setting: str = ""
    wait: Callable[[], object] = nothing
    restart: Callable[[], object] = nothing
    choices: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A contestant as the harness knows it before its library is imported.

    Attributes:
        name: in rows.
        adapter: a module with a function `contestant(case, variant)`.
        package: what must be importable.
        families: the kinds of work that it has calls for.
        variant: which of the adapter's ways.
        environment: variables of its process.
        has_no: families that it could be expected to have a call for.
        corrects_epsilon: whether its Adam is the oracle's; see there.
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

    def missing(self) -> str | None:
        """Why it cannot take part here."""
        return None if importlib.util.find_spec(self.package.partition(".")[0]) else "not installed"

    @property
    def arguments(self) -> list[str]:
        """What a process of its own is told of it; see `made_ready`."""
        return [self.adapter, self.variant]


def made_ready(adapter: str, variant: str, case: Case) -> Contestant:
    """A contestant with a case at hand; imports the library."""
    made: Contestant = importlib.import_module(adapter).contestant(case, variant)
    return made


def named(name: str) -> Entry:
    """One of `CPU`."""
    return next(one for one in CPU if one.name == name)


TRAINING = ("step", "fit", "startup", "memory")
LAYERS = ("layer", "loss")

SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}
"""How often an OpenMP thread of PyTorch's looks for work before it sleeps. By default 30 times as often: no faster
where nothing else runs, and up to a thousand times slower where something does."""

CPU = (
    Entry(OURS, "ours", f"{__name__}.gpuback_library", "gpuback", (*LAYERS, *TRAINING, "reproducible")),
    Entry("gpuback reproducible", "mode", f"{__name__}.gpuback_library", "gpuback", ("reproducible",), "reproducible"),
    Entry(
        "PyTorch eager", "peer", f"{__name__}.pytorch", "torch", (*LAYERS, *TRAINING, "product"), environment=SHORT_SPIN
    ),
    Entry(
        "PyTorch compiled",
        "peer",
        f"{__name__}.pytorch",
        "torch",
        ("loss", "step", "fit", "startup"),  # a layer is products, which it leaves alone; compiling takes what it takes
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
        ("layer", "step", "reproducible", "product", "copy"),
    ),
)
