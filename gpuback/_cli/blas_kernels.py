"""Find OpenBLAS's fastest kernels by measuring. It has a set for each generation of processors.

OpenBLAS chooses when it is loaded: the set that OPENBLAS_CORETYPE names, or else the one that it knows for the
processor, which need not be the fastest. So every set that the processor can run is timed in a process of its own
(`blas_products`), on one thread. The processes take turns, and the least time of a product counts, so that other
programs on the same cores slow the measurement down and do not decide it. The result is kept in the folder of compiled
kernels, by processor and versions. Where it cannot be kept, each process that wants it measures anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuback._cli import blas_products, machine
from gpuback._cli.machine import Blas, Cpu
from gpuback._cuda import cache
from gpuback._text import shown
from gpuback.errors import GpubackError

VARIABLE = "OPENBLAS_CORETYPE"

FORMAT = 1
"""Of a kept measurement. A change of what is measured needs another number."""

TURNS = 5
LIMIT = 30.0
"""Seconds for all turns. They take a third of a second, and two with four busy programs on two cores."""

NOISE = 1.01
"""How many times as fast as OpenBLAS's own choice another set must be to take its place."""


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        rates: kernel set → floating-point operations per second, the geometric mean over products; OpenBLAS's own
            choice comes first. Empty if nothing was compared.
        note: why nothing was compared, or why the result is not kept; else empty.
    """

    rates: Mapping[str, float]
    note: str = ""

    @property
    def fastest(self) -> str | None:
        """The set to use; None if nothing was compared."""
        if not self.rates:
            return None
        own, best = next(iter(self.rates)), max(self.rates, key=self.rates.__getitem__)
        return best if self.rates[best] > NOISE * self.rates[own] else own

    @property
    def better(self) -> str | None:
        """The set that is faster than OpenBLAS's own choice; None if that is best or nothing was compared."""
        return self.fastest if self.rates and self.fastest != next(iter(self.rates)) else None


def compare(cpu: Cpu, blas: Blas) -> Comparison:
    """Return what was measured on this processor before, or measure it now: half a second, more on busy cores."""
    if "openblas" not in (blas.library or "") or blas.kernel is None:
        return Comparison({}, f"{blas.library or 'this BLAS'} chooses its kernels itself")
    if VARIABLE in os.environ:
        return Comparison({}, f"{VARIABLE}={shown(os.environ[VARIABLE], 50)} is set")
    names = [blas.kernel, *(name for name in sets_of(cpu) if name != blas.kernel)]
    if len(names) == 1:
        return Comparison({}, f"for this processor there are no others than {blas.kernel}'s")
    if not sys.executable or getattr(sys, "frozen", False):
        return Comparison({}, "a frozen program cannot start Python to compare them")
    identity = identity_of(cpu, blas)
    kept = find(identity, names)
    if kept is not None:
        return Comparison(kept)
    try:
        rates = measure(names)
    except (OSError, ValueError, RuntimeError) as error:
        return Comparison({}, f"they could not be compared: {error}")
    return Comparison(rates, keep(identity, rates))


def sets_of(cpu: Cpu) -> list[str]:
    """List the kernel sets to try. Arm processors have none: OpenBLAS knows their models, and an unfit set crashes."""
    return [*(["Haswell"] if cpu.has_avx2 else []), *(["SkylakeX"] if cpu.has_avx512 else [])]


def advice_for(comparison: Comparison) -> str | None:
    """Say what to set where another set is faster than OpenBLAS's own choice."""
    better = comparison.better
    if better is None:
        return None
    own, gain = next(iter(comparison.rates)), comparison.rates[better] / next(iter(comparison.rates.values()))
    return (
        f"OpenBLAS chooses its {own} kernels, and {better}'s are {gain - 1:.0%} faster here. Long runs of `gpuback"
        f" train` take those. To have them in programs of your own, set {VARIABLE}={better} before Python starts."
    )


# ---- Measuring


def measure(names: Sequence[str]) -> dict[str, float]:
    """Measure the rate of each set that this OpenBLAS has, in operations per second.

    Raises:
        OSError, ValueError, RuntimeError: a process could not be started, or did not answer as it should.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    late = threading.Timer(LIMIT, _kill, [processes])
    late.daemon = True
    try:
        for name in names:
            processes[name] = _start({} if name == names[0] else {VARIABLE: name})
        late.start()
        # An OpenBLAS for one generation of processors ignores the variable.
        there = {name: process for name, process in processes.items() if _answer(process) == name}
        if names[0] not in there:
            raise RuntimeError(f"a new process does not choose {names[0]}")
        turns: dict[str, list[list[float]]] = {name: [] for name in there}
        for _ in range(TURNS):
            for name, process in there.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                turns[name].append(_seconds(_answer(process)))
    finally:
        late.cancel()
        _kill(processes)
        for process in processes.values():
            process.communicate()
    return {name: _rate(np.min(seconds, axis=0)) for name, seconds in turns.items()}


def _start(variables: Mapping[str, str]) -> subprocess.Popen[str]:
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", blas_products.__file__],  # -P: its folder is no place to import from
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **one_thread, **variables},
        text=True,
    )


def _kill(processes: Mapping[str, subprocess.Popen[str]]) -> None:
    for process in processes.values():
        process.kill()


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process ended, or took longer than {LIMIT:g} s")
    return json.loads(line)


def _seconds(answer: Any) -> list[float]:
    if not _are_positive(answer) or len(answer) != len(blas_products.FLOPS):
        raise ValueError(f"expected {len(blas_products.FLOPS)} times, got {str(answer)[:60]}")
    return list(answer)


def _are_positive(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(one) is float and 0 < one < math.inf for one in numbers)


def _rate(seconds: Any) -> float:
    return float(np.exp(np.mean(np.log(blas_products.FLOPS) - np.log(seconds))))


# ---- Keeping


def identity_of(cpu: Cpu, blas: Blas) -> dict[str, Any]:
    """Collect what a measurement depends on. Virtual machines hide a model's name, not its family and stepping."""
    return {
        "format": FORMAT,
        "cpu": [platform.machine(), cpu.model, cpu.revision, *cpu.simd],
        "openblas": [blas.version, blas.kernel],
        "numpy": np.__version__,
    }


def path_name(identity: Mapping[str, Any]) -> str:
    return f"blas-{cache.key_of(identity)[:32]}.json"


def find(identity: Mapping[str, Any], names: Sequence[str]) -> dict[str, float] | None:
    """Return the rates that were kept. A file that is damaged, another's or of anything else counts as absent."""
    try:
        found = json.loads(cache.read_file(path_name(identity)))
        rates = found["rates"]
        if found["identity"] != identity or found["sha256"] != cache.key_of(identity, rates):
            return None
        sound = next(iter(rates)) == names[0] and set(rates) <= set(names) and _are_positive([*rates.values()])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
        return None
    return rates if sound else None


def keep(identity: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """Write the rates for later processes, whole or not at all. Return why they cannot be kept, or ""."""
    content = {"identity": identity, "rates": rates, "sha256": cache.key_of(identity, rates)}
    try:
        cache.write_file(path_name(identity), json.dumps(content, indent=1).encode())
    except (OSError, GpubackError) as error:
        return f"measured each time, since it cannot be kept: {error}"
    return ""


# ---- Using

LONG_RUN = 3e12
"""Operations of training, half a minute of two cores, from which on a restart costs less than 3 % of the run."""

may_restart = False
"""Whether this process runs the command line and nothing else, as when a user typed it."""


def use_fastest(files: Sequence[str], epochs: int, width: int) -> None:
    """Start the program anew with the fastest kernels, if they are not OpenBLAS's own choice and training takes long.

    Which kernels a run has depends on its files and options, and not on how busy the machine is.

    Args:
        files: the data, whose numbers are taken to be 8 bytes long.
        epochs: passes over the data.
        width: outputs of the first layer, whose products are taken to be all.
    """
    operations = 6 * epochs * width * sum(map(os.path.getsize, files)) / 8
    if may_restart and operations >= LONG_RUN and os.name == "posix":
        better = compare(machine.cpu_here(), machine.blas_here()).better
        if better is not None:
            _restart(better)


def _restart(kernels: str) -> None:
    """Replace this process. Return if the system refuses."""
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: kernels})
