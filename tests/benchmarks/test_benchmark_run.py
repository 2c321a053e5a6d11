"""Whole runs of the command on a GPU, without one: what it prints, what it leaves behind, how it ends.

CuPy is `fake_cupy`, on NumPy. Nothing here is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import fake_cupy
from support.gpu_cases import TINY
from support.requirements import require_gpu

import gpuback
from benchmarks.cases import Case, selection
from benchmarks.cases.selection import FIRST, USUAL, Job, jobs
from benchmarks.harness.budget import GUESSES, Budget
from benchmarks.reports.report import report
from benchmarks.reports.results import Environment, Results, Row, load

typer = pytest.importorskip("typer")
CliRunner = importlib.import_module("typer.testing").CliRunner
command = importlib.import_module("benchmarks.__main__")
harness = importlib.import_module("benchmarks.harness.run")
LiveTable = importlib.import_module("benchmarks.reports.live_table").LiveTable
Console = importlib.import_module("rich.console").Console

ENVIRONMENT = Environment("A GPU", "gpu", 7, None, "2026-01-02T03:04:05+00:00", {"gpuback": "0.1"}, "cuBLAS 130200")


def failing(*arguments: Any) -> Any:
    raise RuntimeError("no\nluck")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(command.app, list(arguments))


# ---- Within a time


def measured(planned: list[Job], seconds: float, folder: Path) -> tuple[Results, list[Job]]:
    """A run in which every row takes ten seconds, by a clock of its own."""
    saved: list[int] = []
    now = 100.0

    def fill(cases: tuple[Case, ...], rows: list[Row], say: Any) -> None:
        nonlocal now
        now += 10.0
        if (folder / "x.json").exists():
            saved.append(len(load(folder / "x.json").rows))
        rows[0].absent["nvmath epilogs"] = "not installed"

    results, budget = Results(ENVIRONMENT, {}, []), Budget(seconds, GUESSES, lambda: now)
    console = Console(width=170)
    left_out = harness.measure(
        planned, fill, budget, results, folder / "x.json", lambda family: LiveTable(console, family, results)
    )
    assert saved == list(range(1, len(results.rows)))  # each row was in the file before the next was measured
    return results, left_out


def test_a_run_ends_in_time_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [Job(USUAL, (selection.layer((256, 64, 64), dtype),)) for dtype in selection.LAYER_DTYPES]
    results, left_out = measured(planned, 25.0, tmp_path)
    assert [row.dtype for row in results.rows] == ["bfloat16", "float32"] and left_out == planned[2:]
    assert harness.title(left_out[0]) == "layer 256 × 64 × 64 (B × nO × nI), tf32"
    assert capsys.readouterr().out.count("without nvmath epilogs: not installed") == 1


def test_a_short_row_may_follow_one_that_was_left_out(tmp_path: Path) -> None:
    planned = [Job(USUAL, (TINY["step"],)), Job(USUAL, (TINY["host"],))]
    _, left_out = measured(planned, 12.0, tmp_path)
    assert left_out == planned[:1]


# ---- All of it, on a GPU that is none


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """The command on one tiny row of some families."""
    monkeypatch.setattr(harness.signal, "signal", lambda *_: None)
    monkeypatch.setattr(harness.faulthandler, "enable", lambda: None)

    def run(*families: str) -> Any:
        monkeypatch.setattr(
            command, "jobs", lambda device, names, *_, **__: [Job(FIRST, (TINY[name],)) for name in names]
        )
        path = str(tmp_path / "gpu.json")
        return invoke("--device", "cuda", "--quick", "--families", ",".join(families), "--json", path)

    with fake_cupy.installed():
        yield run


def test_a_run_leaves_figures_and_tables(whole: Any, tmp_path: Path) -> None:
    done = whole("loss", "reproducible")
    assert done.exit_code == 0 and done.stdout.splitlines()[-2].startswith("best peer ÷ gpuback: loss float32")
    path = tmp_path / "gpu.json"
    found = load(path)
    assert found.environment.kind == "gpu" and found.environment.device == "A fake GPU"
    assert found.ceilings == fake_cupy.CEILINGS
    assert {row.family for row in found.rows} == {"loss", "reproducible"}
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "A fake GPU, 7 multiprocessors" in text and "PyTorch eager: not installed" in text
    assert invoke("compare", str(path), str(path)).exit_code == 0
    pytest.importorskip("matplotlib")
    report(path, tmp_path)
    assert "![" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_sizes_of_ones_own(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    done = invoke(
        *("--device", "cuda", "--sizes", "64-64-10:256", "--families", "step", "--rounds", "2", "--json", str(path)),
    )
    assert done.exit_code == 0, done.output
    rows = load(path).rows
    assert [(row.label, row.dtype) for row in rows] == [
        ("64-64-10, B = 256, Adam", "float32"), ("64-64-10, B = 256, Adam", "bfloat16"),
    ]  # fmt: skip
    for row in rows:
        assert len(row.contestants["gpuback"].rounds) == 2
        assert row.contestants["gpuback graph"].setting == "CUDA graph"


def test_gpuback_failing_is_the_exit_status(whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.peers.gpu_gpuback"), "loss", failing)
    done = whole("loss")
    assert done.exit_code == 1
    assert load(tmp_path / "gpu.json").rows[0].absent["gpuback"] == "RuntimeError: no luck"
    assert "FAILED: loss n: 5 classes, B = 32, float32: gpuback: RuntimeError: no luck" in done.stdout


def test_a_run_that_is_stopped_keeps_what_it_has(whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = importlib.import_module("benchmarks.harness.gpu_measure")
    first = measure.measure

    def stopped(cases: Any, rows: Any, run: Any) -> Any:
        return first(cases, rows, run) if cases[0].family == "loss" else harness.stop()

    monkeypatch.setattr(measure, "measure", stopped)
    assert whole("loss", "step").exit_code != 0
    assert [row.family for row in load(tmp_path / "gpu.json").rows] == ["loss"]
    assert "5 classes" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_gpu_that_broke_down_ends_the_run(whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.peers.gpu_cupy"), "loss", failing)
    monkeypatch.setattr(importlib.import_module("benchmarks.harness.gpu_timing"), "synchronize", failing)
    assert isinstance(whole("loss").exception, RuntimeError)
    assert load(tmp_path / "gpu.json").rows == []


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(available=False, reason="there is none")
    monkeypatch.setattr(gpuback, "backends", lambda: {"cupy": status})
    done = invoke("--device", "cuda", "--quick")
    assert (done.exit_code, done.stderr) == (2, "there is none\n")


@pytest.mark.parametrize(
    "options",
    [
        ["--families", "steps"], ["--device", "cuda", "--without", "Torch"], ["--seconds", "soon"],
        ["--contestants", "CuPy"], ["--sizes", "64-x:1"], ["--dtype", "bfloat16"], ["--contestant", "no_such_module"],
        ["--device", "cuda", "--families", "loss", "--dtype", "float32,tf32"], ["--rounds", "0"],
    ],
)  # fmt: skip
def test_unknown_options_are_refused(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "run", failing)
    done = invoke(*options, "--json", str(tmp_path / "none.json"))
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "compare", "report"])
def test_every_option_is_explained(name: str) -> None:
    whole = importlib.import_module("typer.main").get_command(command.app)
    one = whole.commands[name] if name else whole
    assert one.help
    for parameter in one.params:
        assert parameter.name == "help" or parameter.help, parameter.name
    assert invoke(*filter(None, [name]), "--help").exit_code == 0


# ---- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", selection.FAMILIES["cuda"])
def test_a_quick_run(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One small row of a family, with whoever is installed; a start of two."""
    require_gpu()
    monkeypatch.setattr(harness.signal, "signal", lambda *_: None)
    planned = [Job(FIRST, (TINY[family],))] if family in TINY else jobs("cuda", [family])
    monkeypatch.setattr(command, "jobs", lambda *_, **__: planned)
    without = ["--without", "JAX jit,PyTorch compiled"] if family == "startup" else []
    path = tmp_path / "x.json"
    done = invoke("--device", "cuda", "--quick", "--families", family, *without, "--json", str(path))
    assert done.exit_code == 0, done.output
    found = load(path)
    assert {row.family for row in found.rows} == {family} and found.ceilings["copy"] > 0
    for row in found.rows:
        assert min(row.contestants["gpuback"].rounds) > 0
    assert "| gpuback |" in (tmp_path / "x.md").read_text(encoding="utf-8")
