"""gpuback._cli.blas_kernels: OpenBLAS's kernels are compared where there is a choice. Nothing is timed here.

Most tests put a script in the place of `blas_products`, which says what it is told to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback._cli import blas_kernels, blas_products, machine
from gpuback._cli.blas_kernels import Comparison, compare
from gpuback._cli.machine import Blas, Cpu
from gpuback._cuda import cache

ZEN = Cpu("AMD EPYC", 2, 2, ("avx2", "fma", "avx512f"), "AuthenticAMD 25 17 1")
OPENBLAS = Blas("openblas", "0.3.31", 2, "SkylakeX")
RATES = {"SkylakeX": 5e10, "Haswell": 6e10}

SCRIPT = """
import json, os, sys, time
kernels = os.environ.get("OPENBLAS_CORETYPE", "SkylakeX")
with open({log!r}, "a") as log:
    print(kernels, os.environ["OPENBLAS_NUM_THREADS"], file=log)
{body}
print(json.dumps(kernels), flush=True)
for turn, _ in enumerate(sys.stdin):
    print(json.dumps([{seconds}] * {count}), flush=True)
"""


@pytest.fixture(autouse=True)
def _no_choice_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(tmp_path / "kept"))


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """Sets what a process does before it answers and what it answers; returns the log of processes so far."""
    log = tmp_path / "log"

    def set_up(body: str = "", seconds: str = "1.0 if kernels == 'SkylakeX' else 0.5", count: int = 12) -> list[str]:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(log=str(log), body=body, seconds=seconds, count=count), encoding="utf-8")
        monkeypatch.setattr(blas_products, "__file__", str(script))
        return log.read_text().splitlines() if log.exists() else []

    set_up()
    return set_up


def kept_file() -> Path:
    (file,) = cache.folder().glob("blas-*.json")
    return file


# ---- Where there is no choice


@pytest.mark.parametrize(
    "cpu, blas, note",
    [
        (ZEN, Blas("mkl", "2024.1", 8, None), "mkl chooses its kernels itself"),
        (ZEN, Blas("accelerate", None, None, None), "accelerate chooses its kernels itself"),
        (ZEN, Blas("scipy-openblas", "0.3.29", None, None), "scipy-openblas chooses its kernels itself"),
        (ZEN, Blas(None, None, None, None), "this BLAS chooses its kernels itself"),
        (Cpu("Neoverse", 4, 4, ("asimd", "sve")), Blas("openblas", "0.3.29", 4, "neoversen1"), "no others than"),
        (Cpu("old", 4, 4, ("sse4_2", "avx")), Blas("openblas", "0.3.29", 4, "Sandybridge"), "no others than"),
        (Cpu("new", 4, 4, ("avx2",)), Blas("openblas", "0.3.29", 4, "Haswell"), "no others than Haswell"),
    ],
)
def test_nothing_is_measured_where_there_is_no_choice(cpu: Cpu, blas: Blas, note: str, measures: Any) -> None:
    found = compare(cpu, blas)
    assert not found.rates and found.fastest is found.better is None
    assert note in found.note
    assert measures() == []
    assert blas_kernels.advice_for(found) is None


@pytest.mark.parametrize("value", ["Haswell", "nonsense", ""])
def test_the_users_choice_is_respected(value: str, measures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", value)
    assert compare(ZEN, OPENBLAS) == Comparison({}, f"OPENBLAS_CORETYPE={value} is set")
    assert measures() == []


def test_a_frozen_program_starts_no_processes(measures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "frozen" in compare(ZEN, OPENBLAS).note
    assert measures() == []


@pytest.mark.parametrize("simd", [("avx2", "avx512f"), ("X86_V3", "X86_V4")])
def test_sets_are_what_the_processor_can_run(simd: tuple[str, ...]) -> None:
    assert blas_kernels.sets_of(Cpu("x", 1, 1, simd)) == ["Haswell", "SkylakeX"]
    assert blas_kernels.sets_of(Cpu("x", 1, 1, simd[:1])) == ["Haswell"]
    assert blas_kernels.sets_of(Cpu("x", 1, 1, ("asimd",))) == []


# ---- Measuring


def test_each_set_is_measured_once_in_a_process_with_one_thread(measures: Any) -> None:
    found = compare(ZEN, OPENBLAS)
    assert list(found.rates) == ["SkylakeX", "Haswell"] and found.note == ""
    assert found.rates["Haswell"] == pytest.approx(2 * found.rates["SkylakeX"])
    flops = np.array(blas_products.FLOPS, float)
    assert found.rates["SkylakeX"] == pytest.approx(np.exp(np.log(flops).mean()))
    assert found.fastest == found.better == "Haswell"
    assert sorted(measures()) == ["Haswell 1", "SkylakeX 1"]
    assert compare(ZEN, OPENBLAS) == found
    assert len(measures()) == 2  # the second comparison was found in the folder


@pytest.mark.thorough
def test_the_least_time_counts(measures: Any) -> None:
    """A neighbour who takes the core in all turns but one changes nothing."""
    measures(seconds="1.0 if turn == 3 else 50.0 if kernels == 'SkylakeX' else 9.0")
    found = compare(ZEN, OPENBLAS)
    assert found.rates["SkylakeX"] == pytest.approx(found.rates["Haswell"])


@pytest.mark.parametrize(
    "rates, fastest, better",
    [
        ({"SkylakeX": 5e10, "Haswell": 6e10}, "Haswell", "Haswell"),
        ({"SkylakeX": 6e10, "Haswell": 5e10}, "SkylakeX", None),
        ({"Zen": 6.0e10, "Haswell": 6.01e10, "SkylakeX": 5e10}, "Zen", None),  # within the noise
        ({"Haswell": 5e10, "SkylakeX": 9e10}, "SkylakeX", "SkylakeX"),
        ({"Haswell": 5e10}, "Haswell", None),
    ],
)
def test_the_fastest_is_taken(rates: dict[str, float], fastest: str, better: str | None) -> None:
    found = Comparison(rates)
    assert (found.fastest, found.better) == (fastest, better)
    advice = blas_kernels.advice_for(found)
    assert (advice is None) == (better is None)
    assert advice is None or f"OPENBLAS_CORETYPE={better}" in advice


@pytest.mark.thorough
def test_an_openblas_with_one_set_ignores_the_variable(measures: Any) -> None:
    measures("kernels = 'SkylakeX'")
    found = compare(ZEN, OPENBLAS)
    assert list(found.rates) == ["SkylakeX"] and found.better is None


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize(
    "body, seconds, said",
    [
        ("kernels == 'Haswell' and os.abort()", "1.0", "a process ended"),
        ("kernels = 'Nehalem'", "1.0", "a new process does not choose SkylakeX"),
        ("print('libfancy says hello')", "1.0", "could not be compared"),
        ("", "0.0", "expected 12 times"),
        ("", "float('nan')", "expected 12 times"),
        ("", "'1'", "expected 12 times"),
        ("sys.exit(3)", "1.0", "a process ended"),
        ("time.sleep(60)", "1.0", "took longer than 0.5 s"),
    ],
)
def test_a_measurement_that_fails_is_a_note(
    body: str, seconds: str, said: str, measures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in body:
        monkeypatch.setattr(blas_kernels, "LIMIT", 0.5)
    measures(body, seconds)
    found = compare(ZEN, OPENBLAS)
    assert said in found.note and not found.rates
    assert not cache.folder().exists()  # the next process tries again


@pytest.mark.thorough
def test_no_process_is_left_when_measuring_is_interrupted(measures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = blas_kernels._start

    def noted(variables: dict[str, str]) -> subprocess.Popen[str]:
        started.append(start(variables))
        return started[-1]

    def interrupted(process: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(blas_kernels, "_start", noted)
    monkeypatch.setattr(blas_kernels, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(ZEN, OPENBLAS)
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_products_are_right() -> None:
    def numbers(function: Any) -> dict[str, np.ndarray]:
        return {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, function.__closure__, strict=True)}

    for shape in blas_products.SHAPES[::3]:
        forward, (dW,), (dh,) = blas_products.products(*shape)
        for way in forward:
            cells = numbers(way)
            cells["a"].fill(0)
            way()
            np.testing.assert_allclose(cells["a"], cells["h"] @ cells["W"].T, rtol=1e-3, atol=1e-3)
        for way in (dW, dh):
            way()
        left = numbers(dW)
        np.testing.assert_allclose(left["dW"], left["da"].T @ left["h"], rtol=1e-3, atol=1e-3)
        below = numbers(dh)
        np.testing.assert_allclose(below["dh"], below["da"] @ below["W"], rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_this_machine() -> None:
    found = compare(machine.cpu_here(), machine.blas_here())
    assert found.note or len(found.rates) >= 2
    assert all(1e8 < rate < 1e13 for rate in found.rates.values())


# ---- Keeping


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The measurements so far, which come to `RATES`."""
    made: list[Any] = []

    def measure(names: list[str]) -> dict[str, float]:
        made.append(names)
        return RATES

    monkeypatch.setattr(blas_kernels, "measure", measure)
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {"cpu": Cpu("AMD EPYC", 2, 2, ("avx2", "fma", "avx512f"), "AuthenticAMD 26 2 1")},  # hidden behind one name
        {"cpu": Cpu("AMD EPYC", 2, 2, ("avx2", "avx512f"), "AuthenticAMD 25 17 1")},
        {"blas": Blas("openblas", "0.3.32", 2, "SkylakeX")},
        {"numpy": "9.9"},
    ],
)
def test_another_processor_or_version_is_measured_anew(
    changed: dict[str, Any], counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(ZEN, OPENBLAS)
    if "numpy" in changed:
        monkeypatch.setattr(np, "__version__", changed["numpy"])
    compare(changed.get("cpu", ZEN), changed.get("blas", OPENBLAS))
    assert len(counted) == 2
    assert len(list(cache.folder().iterdir())) == 2


def with_changes(**changes: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        found = json.loads(content) | changes
        if "rates" in changes and "sha256" not in changes:
            found["sha256"] = cache.key_of(found["identity"], found["rates"])
        return json.dumps(found).encode()

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-9],
        lambda content: b"\xff\xfe" + content,
        lambda content: b"[" * 100_000,
        lambda content: b"[]",
        lambda content: b"null",
        lambda content: content.replace(b"0.3.31", b"0.3.30"),
        lambda content: content.replace(b'"Haswell": ', b'"Haswell": 1'),
        with_changes(rates=None),
        with_changes(rates=[]),
        with_changes(rates={}),
        with_changes(rates={"Haswell": 1e9}),
        with_changes(rates={"Haswell": 1e9, "SkylakeX": 1e9}),
        with_changes(rates={"SkylakeX": 1e9, "Nehalem": 1e9}),
        with_changes(rates={"SkylakeX": 1e9, "Haswell": -1e9}),
        with_changes(rates={"SkylakeX": 1e9, "Haswell": float("nan")}),
        with_changes(rates={"SkylakeX": 1e9, "Haswell": float("inf")}),
        with_changes(rates={"SkylakeX": 1e9, "Haswell": "fast"}),
        with_changes(rates={"SkylakeX": 1e9, "Haswell": 10**400}),
        with_changes(rates={"SkylakeX": 1e9, "Haswell": True}),
        with_changes(sha256="0"),
    ],
)
def test_a_damaged_entry_is_measured_anew(damage: Callable[[bytes], bytes], counted: list[Any]) -> None:
    first = compare(ZEN, OPENBLAS)
    file = kept_file()
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    assert compare(ZEN, OPENBLAS) == first
    assert len(counted) == 2
    assert file.read_bytes() == sound


@pytest.mark.skipif(os.name != "posix", reason="links, pipes and permission bits")
@pytest.mark.parametrize("make", ["link", "pipe", "folder", "writable"])
def test_what_is_no_entry_of_the_users_is_not_read(make: str, counted: list[Any], tmp_path: Path) -> None:
    first = compare(ZEN, OPENBLAS)
    file = kept_file()
    content = file.read_bytes()
    if make == "writable":
        file.chmod(0o666)
    else:
        file.unlink()
    if make == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif make == "pipe":
        os.mkfifo(file)
    elif make == "folder":
        file.mkdir()
    assert compare(ZEN, OPENBLAS).rates == first.rates
    assert len(counted) == 2
    assert compare(ZEN, OPENBLAS).rates == first.rates
    assert len(counted) == (3 if make == "folder" else 2)  # a folder is nobody's to replace


@pytest.mark.parametrize("place", ["below a file", "for everybody"])
def test_where_nothing_can_be_kept_it_is_measured_each_time(
    place: str, counted: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "no" / "folder"
    if place == "below a file":
        folder.parent.touch()
    elif os.name == "posix":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(folder))
    for count in (1, 2):
        found = compare(ZEN, OPENBLAS)
        assert found.fastest == "Haswell"
        assert (
            found.note.startswith("measured each time, since it cannot be kept: ") and str(folder.parent) in found.note
        )
        assert len(counted) == count


# ---- Using

TRAIN = """
import os, sys
from gpuback._cli import blas_kernels, machine
from gpuback._cli.main import main
blas_kernels.LONG_RUN = 0
cpu, blas = machine.cpu_here(), machine.blas_here()
others = [name for name in blas_kernels.sets_of(cpu) if name != blas.kernel]
if others and "OPENBLAS_CORETYPE" not in os.environ:
    blas_kernels.keep(blas_kernels.identity_of(cpu, blas), {blas.kernel: 1e9, others[0]: 2e9})
code = main()
print(code, blas.kernel, os.environ.get("OPENBLAS_CORETYPE"), *others)
"""


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="a program cannot be replaced there")
def test_a_long_run_has_the_fastest_kernels(tmp_path: Path) -> None:
    here = machine.blas_here()
    others = [name for name in blas_kernels.sets_of(machine.cpu_here()) if name != here.kernel]
    if here.library != "openblas" or not others:
        pytest.skip("there is no choice of kernels")
    (tmp_path / "xor.csv").write_text("a,b,y\n" + "0,0,0\n0,1,1\n1,0,1\n1,1,0\n" * 5)
    command = ["train", "xor.csv", "--epochs", "1", "--no-plot", "--quiet", "--backend", "numpy"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *command], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(gpuback.__file__).parents[1])},
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.split()[:3] == ["0", others[0], others[0]]
    assert (tmp_path / "xor.safetensors").exists()


@pytest.mark.parametrize(
    "rates, typed, epochs, restarts",
    [
        (RATES, True, 10**7, True),
        (RATES, False, 10**7, False),  # called by another program, which would be lost
        (RATES, True, 10, False),
        ({"SkylakeX": 2.0, "Haswell": 1.0}, True, 10**7, False),
    ],
)
def test_a_restart_is_for_long_runs_that_gain_by_it(
    rates: dict[str, float], typed: bool, epochs: int, restarts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_bytes(b"1" * 4000)
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(blas_kernels, "may_restart", typed)
    monkeypatch.setattr(blas_kernels, "compare", lambda cpu, blas: Comparison(rates))
    blas_kernels.use_fastest([str(tmp_path / "data.csv")], epochs, 128)
    assert bool(started) == restarts
    if restarts:
        program, arguments, environment = started[0]
        assert program == arguments[0] == sys.executable and arguments[1:] == sys.orig_argv[1:]
        assert environment["OPENBLAS_CORETYPE"] == "Haswell"


def test_a_restart_that_the_system_refuses_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "execve", refused)
    monkeypatch.setattr(blas_kernels, "may_restart", True)
    monkeypatch.setattr(blas_kernels, "LONG_RUN", 0)
    monkeypatch.setattr(blas_kernels, "compare", lambda cpu, blas: Comparison(RATES))
    blas_kernels.use_fastest([], 1, 1)
