"""Two runs compared: how often a change is seen, how often one is imagined, and what has no verdict."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_up_results import ROLES, results, row

from benchmarks.reports.changes import Change, Noise, changes_between
from benchmarks.reports.compare import compare
from benchmarks.reports.results import Figures, Results, Row, save
from benchmarks.reports.significance import Shift, run_to_run, student_quantile, trimmed


def run(
    rng: np.random.Generator, rounds: int = 15, *, slow: Collection[int] = (), factor: float = 1.2,
    scatter: float = 0.04, outliers: float = 0.05, unseen: float = 0.01,
) -> Results:  # fmt: skip
    """A table as two busy cores make it: 25 rows, one to four contestants beside gpuback.

    Each row has its own pace, which wanders from round to round. Beside that, each figure scatters by itself; some are
    far too long; and each contestant is a little off for the whole row, which its rounds do not show.
    """
    rows = []
    for index in range(25):
        names = list(ROLES)[: 2 + index % 4]
        pace = rng.normal(0, 0.1) + np.cumsum(rng.normal(0, 0.02, rounds))
        size = len(names), rounds
        own = rng.normal(0, unseen, (len(names), 1)) + rng.normal(0, scatter, size)
        own += (rng.random(size) < outliers) * rng.exponential(0.3, size)
        seconds = 1e-3 * np.exp(0.2 * np.arange(len(names))[:, None] + pace + own)
        if index in slow:
            seconds[0] *= factor
        figures = dict(zip(names, seconds.tolist(), strict=True))
        row_of = {name: Figures(rounds_of, "", ROLES[name]) for name, rounds_of in figures.items()}
        rows.append(row({}, case=str(index), contestants=row_of))
    return results(rows)


def false_alarms(seed: int, tables: int, **noise: Any) -> float:
    """How many tables of two runs of one commit report anything."""
    rng = np.random.default_rng(seed)
    told = [changes_between(run(rng, **noise), run(rng, **noise)) for _ in range(tables)]
    return sum(any(change.verdict in ("slower", "faster") for change in changes) for changes in told) / tables


def misses(seed: int, tables: int, slow: Collection[int], **noise: Any) -> tuple[float, float]:
    """How many of the slow rows, 20 % each, are not reported; how many tables do not say so of all rows together."""
    rng = np.random.default_rng(seed)
    told = [changes_between(run(rng, **noise), run(rng, slow=slow, **noise)) for _ in range(tables)]
    missed = sum(changes[index].verdict != "slower" for changes in told for index in slow)
    return missed / (tables * len(slow)), sum(changes[-1].verdict != "slower" for changes in told) / tables


@pytest.mark.thorough
def test_runs_of_one_commit_differ_in_nothing() -> None:
    assert false_alarms(0, 100) < 0.02


def test_more_than_the_rounds_show_is_learnt_from_other_contestants() -> None:
    assert false_alarms(1, 50, unseen=0.05, scatter=0.08, outliers=0.1) < 0.05
    rng = np.random.default_rng(1)
    assert Noise.of(run(rng, unseen=0.0), run(rng, unseen=0.0)).contestant.deviation < 0.02
    assert Noise.of(run(rng, unseen=0.05), run(rng, unseen=0.05)).contestant.deviation == pytest.approx(0.07, rel=0.4)


def test_a_row_slower_by_a_fifth_is_found_in_15_rounds() -> None:
    one_in_five, _ = misses(2, 40, slow=range(0, 25, 5))
    assert one_in_five < 0.05
    too_few_rounds, _ = misses(2, 10, slow=range(0, 25, 5), rounds=8)
    assert too_few_rounds > 0.1


def test_rows_together_show_what_each_is_too_noisy_for() -> None:
    single, together = misses(3, 25, slow=range(25), unseen=0.03, scatter=0.08, outliers=0.1)
    assert single > 0.5
    assert together == 0


def test_faster_rows_are_found_too() -> None:
    rng = np.random.default_rng(4)
    changes = changes_between(run(rng, scatter=0.02), run(rng, scatter=0.02, slow=[7, 8], factor=0.75))
    assert {change.title.split()[1]: change.verdict for change in changes if change.verdict != "same"} == {
        "7:": "faster", "8:": "faster",
    }  # fmt: skip


def test_the_machines_pace_is_no_change_of_gpuback() -> None:
    rng = np.random.default_rng(5)
    before, after = run(rng), run(rng)
    for one in after.rows:
        for contestant in one.contestants.values():
            contestant.rounds = [1.3 * figure for figure in contestant.rounds]
    assert {change.verdict for change in changes_between(before, after)}.isdisjoint({"slower", "faster"})
    for contestant in after.rows[3].contestants.values():
        contestant.rounds = [2 * figure for figure in contestant.rounds]
    change = changes_between(before, after)[3]
    assert change.verdict == "unknown" and change.beside.startswith("busy: what ran beside took 2.")


def only(before: Row, after: Row) -> Change:
    (change,) = changes_between(results([before]), results([after]))
    return change


def test_a_reference_with_other_threads_is_none() -> None:
    before, after = (run(np.random.default_rng(seed)).rows[1] for seed in (0, 1))
    assert only(before, after).beside == "bare products, plain NumPy"
    after.contestants["plain NumPy"].setting = "1 thread"
    assert only(before, after).beside == "bare products"
    after.contestants["bare products"].setting = "1 thread"
    alone = only(before, after)
    assert alone.beside == "the clock alone" and alone.margin > 0.2


def test_few_rounds_and_bytes_are_told_by_ranges() -> None:
    """All figures of one run beyond all of the other's, and by more than a quarter, or by a tenth of the memory."""
    seconds = [only(row({"gpuback": 1.0, "A": 1.0}), row({"gpuback": g, "A": 1.0})).verdict for g in (1.0, 1.2, 1.3)]
    assert seconds == ["same", "same", "slower"]
    memory = [only(row({"gpuback": 1e6}, unit="bytes"), row({"gpuback": g}, unit="bytes")) for g in (1.1e6, 1.3e6, 7e5)]
    assert [change.verdict for change in memory] == ["same", "slower", "faster"]


def test_another_blas_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU, seconds of other kernels or threads say nothing about gpuback; what chose the kernels may differ."""

    def run_with(setting: str, blas: str, seconds: float, **environment: Any) -> Results:
        made = results([row({"gpuback": seconds, "A": 1e-4})], blas=f"openblas 0.3, {blas}", **environment)
        made.rows[0].contestants["gpuback"].setting = setting
        return made

    skylake = run_with("2 threads, openblas SkylakeX", "SkylakeX, 2 threads", 93e-6)
    for other in (
        run_with("2 threads, openblas Haswell", "Haswell, 2 threads", 755e-6),
        run_with("1 thread, openblas SkylakeX", "SkylakeX, 2 threads", 755e-6),
        run_with("2 threads, openblas SkylakeX", "Haswell, 2 threads", 755e-6),
    ):
        (change,) = changes_between(other, skylake)
        assert change.verdict == "unknown" and change.beside.startswith("another BLAS: ")
    assert compare(*files(tmp_path, other, skylake)) == 0
    assert "0 unchanged, 1 without a verdict" in (printed := capsys.readouterr().out) and "no verdict" in printed
    named = run_with(
        "2 threads, openblas SkylakeX, OPENBLAS_CORETYPE=SkylakeX", "SkylakeX by OPENBLAS_CORETYPE, 2 threads", 755e-6
    )
    assert [change.verdict for change in changes_between(named, skylake)] == ["faster"]
    kernels = [run_with(f"CUDA graph, {name}", "", 1e-4 * k, kind="gpu") for k, name in enumerate(("a", "b"), 1)]
    assert [change.verdict for change in changes_between(*kernels)] == ["slower"]


def test_figures_of_0_are_no_verdict() -> None:
    assert only(row({"gpuback": 0.0}, unit="bytes"), row({"gpuback": 0.0}, unit="bytes")).verdict == "unknown"


def test_the_statistic_by_hand() -> None:
    assert student_quantile(1e-4, 10) == pytest.approx(5.694, rel=2e-3)  # from tables
    assert student_quantile(0.025, 5) == pytest.approx(2.571, rel=2e-3)
    mean, square, freedom = trimmed(np.array([9.0, 1.0, 2.0, 3.0, -50.0]))
    assert (mean, freedom) == (2.0, 2)
    assert square == pytest.approx(4 / 6)  # winsorized 1 1 2 3 3: squares of deviations sum to 4, over h (h - 1)
    rng = np.random.default_rng(0)
    shifts = [Shift(rng.normal(0, np.hypot(0.05, s)), s**2, 20) for s in rng.uniform(0.01, 0.1, 2000)]
    assert run_to_run(shifts, 0.0, 1.0).deviation == pytest.approx(0.05, rel=0.1)
    assert run_to_run(shifts[:3], 0.0, 1.0).deviation == 1.0


def files(folder: Path, before: Results, after: Results) -> tuple[Path, Path]:
    save(folder / "a.json", before)
    save(folder / "b.json", after)
    return folder / "a.json", folder / "b.json"


def test_the_exit_status_says_whether_something_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(6)
    before = run(rng, scatter=0.02)
    assert compare(*files(tmp_path, before, run(rng, scatter=0.02))) == 0
    assert "25 unchanged" in capsys.readouterr().out
    assert compare(*files(tmp_path, before, run(rng, scatter=0.02, slow=[7]))) == 1
    printed = capsys.readouterr().out
    assert "1 slower or larger" in printed and "24 unchanged" in printed
    assert compare(*files(tmp_path, before, run(rng, scatter=0.02, slow=[7], factor=0.8))) == 0


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = results([row({"gpuback": 1.0})])
    assert compare(*files(tmp_path, one, results(one.rows, device="A GPU"))) == 2
    assert "different machines" in capsys.readouterr().err
    assert compare(*files(tmp_path, one, results([row({"gpuback": 1.0}, case="other")]))) == 2
    assert "no row of gpuback's in common" in capsys.readouterr().err
    a, b = files(tmp_path, one, one)
    b.write_text('{"format": 7}')
    assert compare(a, b) == 2
    assert "b.json: format: expected 1, got 7" in capsys.readouterr().err
    assert compare(a, tmp_path / "none.json") == 2
    assert "none.json" in capsys.readouterr().err


def test_what_only_one_file_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results([row({"gpuback": 1.0, "exact": 2.0}), row({"gpuback": 1.0}, case="gone")])
    after = results([row({"gpuback": 1.0}, absent={"exact": "check failed"})], versions={"numpy": "2.5"})
    after.rows[0].contestants["gpuback"].setting = "1 thread"
    assert compare(*files(tmp_path, before, after)) == 1
    printed = capsys.readouterr().out
    assert "No longer runs: exact, step small: 64-32-10, B = 128, Adam, float32: check failed" in printed
    assert "Only in the first file: step gone" in printed
    assert "Not the same: numpy 2.4 and 2.5" in printed
    assert "Not the same: gpuback ran with 2 threads and 1 thread" in printed
