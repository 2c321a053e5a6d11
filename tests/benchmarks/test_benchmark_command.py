"""The command on a CPU: whole runs, a contestant from outside, two commits. Nothing here is timed."""

from __future__ import annotations

import importlib
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import cpu_measure, roofline
from benchmarks.harness.processes import ROOT
from benchmarks.reports.results import load

pytest.importorskip("typer")
CliRunner = importlib.import_module("typer.testing").CliRunner
commits = importlib.import_module("benchmarks.harness.commits")

SMALL = ("--sizes", "5-7-3:16", "--rounds", "2")


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of milliseconds, ceilings from small copies, no search for the fastest BLAS kernels, no handler left."""
    monkeypatch.setattr(cpu_measure, "WARM_UP", 0.01)
    monkeypatch.setattr(cpu_measure, "SECONDS", 0.005)
    for name, value in {"COPIED": 1 << 20, "REPEATS": 2, "PRODUCT": 64, "WARM_UP": 0.01, "SECONDS": 0.01}.items():
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(importlib.import_module("benchmarks.__main__").app, list(arguments))


def example() -> str:
    """The contestant of benchmarks/README.md."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"), re.DOTALL)
    return text


@pytest.mark.thorough
def test_a_small_run_with_a_contestant_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # for this process; the next line for those that it starts
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "my_layer.py").write_text(example(), encoding="utf-8")
    file = tmp_path / "small.json"
    names = "gpuback,plain NumPy,bare products,scikit-learn"
    done = run(
        *("--families", "layer,step", *SMALL, "--contestants", names, "--contestant", "my_layer:where"),
        *("--json", str(file)),
    )
    assert done.exit_code == 0, done.output
    found = load(file)
    assert set(found.ceilings) == {"copy", "cached copy", "float32", "float64"} and min(found.ceilings.values()) > 0
    layer, *steps = found.rows
    assert set(layer.contestants) == {"gpuback", "plain NumPy", "bare products", "my_layer:where"}, layer.absent
    assert layer.contestants["my_layer:where"].setting.endswith(", where")
    assert layer.absent == {"scikit-learn": "has no call for this"}
    for row in steps:
        assert set(row.contestants) == {"gpuback", "plain NumPy", "bare products", "scikit-learn"}, row.absent
        assert row.absent == {"my_layer:where": "computes single layers"}
        assert all(len(one.rounds) == 2 and min(one.rounds) > 0 for one in row.contestants.values())
    assert "5-7-3" in file.with_suffix(".md").read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("no place for a table", encoding="utf-8")
    refused = run("report", str(file), "--readme", str(page))
    assert (refused.exit_code, refused.stderr) == (
        2,
        f"report: {page}: expected <!-- benchmark --> and then <!-- /benchmark -->, once each, got 0 and 0\n",
    )


def test_the_example_is_short() -> None:
    assert len(example().splitlines()) <= 17


# ---- Two commits

SLOWER = """
import time
_step = TrainStep.__call__
def _slower(self, *arguments, **options):
    time.sleep(0.002)
    return _step(self, *arguments, **options)
TrainStep.__call__ = _slower
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits: gpuback as it is, and one whose steps take two milliseconds longer."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(commits, "REPOSITORY", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "x.cu").touch()
    (tmp_path / "benchmarks").mkdir()  # an earlier commit has benchmarks of its own, which are not what runs
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError")
    shutil.copytree(ROOT / "gpuback", tmp_path / "gpuback", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-q", folder=tmp_path)
    commit(tmp_path)
    with (tmp_path / "gpuback" / "__init__.py").open("a") as file:
        file.write(SLOWER)
    commit(tmp_path)
    return tmp_path


def git(*arguments: str, folder: Path) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git("add", ".", folder=folder)
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "-m", "x", folder=folder)


@pytest.mark.thorough
def test_a_slower_commit_is_found(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.json"
    done = run("compare", "--commits", "HEAD~1", "HEAD", "--sizes", "5-7-3:16", "--rounds", "6", "--json", str(file))
    assert done.exit_code == 1, done.output
    assert "2 slower or larger, 0 faster" in done.output
    rows = load(file).rows
    assert len(rows) == 2
    for row in rows:
        first, second = row.contestants.values()
        assert first.setting == second.setting and "Haswell" in first.setting
        assert min(second.rounds) > 0.002
    assert run("compare", "--commits", "HEAD", "HEAD~1", *SMALL).exit_code == 0


def test_what_is_no_commit_is_said(repository: Path) -> None:
    done = run("compare", "--commits", "HEAD", "no-such-branch", *SMALL)
    assert done.exit_code == 2
    assert done.stderr.startswith("compare: git rev-parse --short --verify no-such-branch")


@pytest.mark.parametrize(
    "options", [("--threads", "1,x"), ("--threads", "0"), ("--threads", "2,2"), ("--threads", ""), ("--busy", "0")]
)
def test_numbers_of_threads_and_processes_are_checked(options: tuple[str, str]) -> None:
    assert run("--families", "threads,busy", *options).exit_code == 2


@pytest.mark.parametrize(
    "arguments", [[], ["a.json"], ["a.json", "b.json", "--rounds", "3"], ["a", "b", *("--commits", "c", "d")]]
)
def test_files_or_commits(arguments: list[str]) -> None:
    assert run("compare", *arguments).exit_code == 2
