"""The benchmark runs, and refuses what does not compute the same thing; nothing here is timed."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cases, results

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_small_run_leaves_a_page_and_can_be_compared_with_itself(tmp_path):
    pytest.importorskip("typer")
    file = tmp_path / "small.json"
    done = run("--families", "step", "--sizes", "5-7-3:16", "--rounds", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = results.load(file)
    assert {row.family for row in found.rows} == {"step"}
    for row in found.rows:
        assert {"gpuback", "plain NumPy", "bare products"} <= set(row.contestants), row.absent
        assert all(len(one.rounds) == 2 and min(one.rounds) > 0 for one in row.contestants.values())
    assert run("report", str(file)).returncode == 0
    assert "5-7-3" in file.with_suffix(".md").read_text(encoding="utf-8")
    assert run("compare", str(file), str(file)).returncode == 0
    page = tmp_path / "page.md"
    page.write_text("no place for a table", encoding="utf-8")
    refused = run("report", str(file), "--readme", str(page))
    assert (refused.returncode, refused.stderr) == (
        2,
        f"report: {page}: expected <!-- benchmark --> and then <!-- /benchmark -->, once each, got 0 and 0\n",
    )


def test_unknown_families_are_refused(tmp_path):
    pytest.importorskip("typer")
    done = run("--families", "steps", "--json", str(tmp_path / "none.json"))
    assert done.returncode != 0
    assert "steps" in done.stderr
    assert not list(tmp_path.iterdir())


def test_flops_are_counted_by_hand():
    (case,) = [one for one in cases.cases(["step"], [cases.network("5-7-3:16")], "float32") if "SGD" in str(one)][:1]
    assert case.sizes == (5, 7, 3)
    products = 2 * 16 * (5 * 7 + 7 * 3) * 2 + 2 * 16 * 7 * 3  # forward, dW; dh of the second layer
    assert 0 <= case.flops - products < 100 * case.batch_size
