"""What benchmarks are made into: pages, plots, a README's table, and a comparison of two runs."""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compare import Change, Noise, changes_between, compare
from benchmarks.markdown import described, page, quantity, rate, short_table, spread
from benchmarks.plots import draw, spread_out, without_batch
from benchmarks.report import BEGIN, END, MarkerError, report
from benchmarks.results import Contestant, Environment, Results, ResultsError, Role, Row, save
from benchmarks.shifts import Shift, run_to_run, student_quantile, trimmed

ROLES: dict[str, Role] = {
    "gpuback": "ours", "bare products": "floor", "plain NumPy": "peer", "A": "peer", "B": "peer", "exact": "mode",
}  # fmt: skip


def results(rows: list[Row], **environment: Any) -> Results:
    fields: dict[str, Any] = {
        "device": "A CPU", "kind": "cpu", "cores": 2, "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00",
        "versions": {"numpy": "2.4", "gpuback": "0.1"}, "blas": "OpenBLAS",
    }  # fmt: skip
    return Results(Environment(**fields | environment), {"copy": 1e10, "float32": 1e11}, rows)


def row(medians: dict[str, float], **fields: Any) -> Row:
    """Three rounds a contestant, a tenth about its median."""
    usual: dict[str, Any] = {
        "family": "step", "case": "small", "label": "64-32-10, B = 128, Adam", "sizes": [64, 32, 10],
        "batch_size": 128, "dtype": "float32", "flops": 2_000_000, "bytes": 100_000, "unit": "s",
    }  # fmt: skip
    contestants = {
        name: Contestant([0.9 * value, value, 1.1 * value], "2 threads", ROLES[name]) for name, value in medians.items()
    }
    return Row(**usual | {"contestants": contestants} | fields)


# ---- Two runs compared


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
        row_of = {name: Contestant(rounds_of, "", ROLES[name]) for name, rounds_of in figures.items()}
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


# ---- Pages


def test_a_page_says_what_was_measured_and_what_was_not() -> None:
    made = results([row({"gpuback": 2e-4, "A": 1e-4, "bare products": 1e-4}, absent={"B": "not installed"})])
    text = page(made, [("A title", "plots/x.png")])
    assert "A CPU, 2 cores; 2026-01-02T03:04:05+00:00; commit abc1234." in text
    assert "copy 10.0 GB/s, float32 products 100 GFLOP/s" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| small:"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "small: 64-32-10, B = 128, Adam", "200 µs (188–212)", "10.0 GFLOP/s", "500 MB/s", "10%", "100 µs (94.0–106)",
        "100 µs (94.0–106)", "0.50 (A)",
    ]  # fmt: skip
    assert "- gpuback: 2 threads\n" in text and "- B: not installed\n" in text
    assert "![A title](plots/x.png)" in text


def test_gpuback_itself_may_be_missing() -> None:
    text = page(results([row({"A": 1.0}, absent={"gpuback": "check failed | off\nby 1"})]))
    assert "| small: 64-32-10, B = 128, Adam | – | 1.00 s (0.94–1.06) |" in text
    assert "- gpuback: check failed" in text


def test_other_settings_name_their_cases() -> None:
    rows = [row({"A": 1.0}), row({"A": 1.0}, case="tiny"), row({"A": 1.0}, label="64-32-10, B = 128, SGD")]
    rows[2].contestants["A"].setting = "1 thread"
    assert "- A: 2 threads; 1 thread in step small (SGD)\n" in page(results(rows))
    rows += [row({"B": 1.0}, family="layer", case=name, absent={"A": "has no call for this"}) for name in "xy"]
    assert "- A: has no call for this (layer)\n" in page(results(rows))


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (9.999e-4, "s", "1.00 ms"), (9.994e-4, "s", "999 µs"), (2.5e-9, "s", "2.50 ns"), (75.0, "s", "75.0 s"),
        (1234.0, "bytes", "1.23 kB"), (0.0, "bytes", "0.00 B"),
    ],
)  # fmt: skip
def test_figures_have_three_digits(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_rates_and_spreads() -> None:
    assert rate(1.55e11, "FLOP/s") == "155 GFLOP/s" and rate(12.0, "B/s") == "12.0 B/s"
    assert spread(Contestant([1e-3, 1e-3, 1e-3], "", "ours"), "s") == "1.00 ms (1.00–1.00)"
    assert spread(None, "s") == "–"


def test_the_short_table_shows_losses_as_losses() -> None:
    lost = row({"gpuback": 1e-3, "A": 5e-4, "B": 1.04e-3, "bare products": 3e-4})
    exact = row({"gpuback": 1e-3, "exact": 8e-3}, family="reproducible")
    sgd = row({"gpuback": 1e-3, "A": 2e-3}, label="64-32-10, B = 128, SGD")
    lines = short_table(results([lost, exact, sgd, row({"gpuback": 1.0}, family="fit")])).splitlines()
    assert lines[0].startswith("A CPU, 2 cores; OpenBLAS; commit abc1234, 2026-01-02.")
    assert lines[2:] == [
        "| network, batch | gpuback | A | B | bare products | exact |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| small: 64-32-10, B = 128, Adam | 1.00 ms | 0.50 × | 1.04 × | 0.30 × | 8.00 × |",
        "| small: 64-32-10, B = 128, SGD | 1.00 ms | 2.00 × | – | – | – |",
    ]
    with pytest.raises(ResultsError, match="no training step"):
        short_table(results([exact]))


def test_a_report_is_a_page_and_a_table_between_the_markers(tmp_path: Path) -> None:
    save(tmp_path / "cpu.json", results([row({"gpuback": 1e-3, "A": 5e-4})]))
    readme = tmp_path / "README.md"
    readme.write_bytes(f"Above\r\n{BEGIN}\nold\n{END}\nbelow × {{}} \\1\n".encode())
    report(tmp_path / "cpu.json", tmp_path / "made" / "plots", readme)
    text = readme.read_bytes().decode()
    assert text.startswith(f"Above\r\n{BEGIN}\nA CPU") and text.endswith(f"0.50 × |\n{END}\nbelow × {{}} \\1\n")
    assert "old" not in text
    report(tmp_path / "cpu.json", None, readme)
    assert readme.read_bytes().decode() == text
    report(tmp_path / "cpu.json", tmp_path / "made" / "plots")
    assert "](made/plots/cpu-best-peer.png)" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", f"{BEGIN}", f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_without_one_place_for_the_table_nothing_is_written(tmp_path: Path, text: str) -> None:
    save(tmp_path / "cpu.json", results([row({"gpuback": 1e-3})]))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(MarkerError, match=r"README\.md: expected"):
        report(tmp_path / "cpu.json", tmp_path / "plots", readme)
    assert readme.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "cpu.json"]


def test_the_readme_has_one_place_for_the_table() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


# ---- Plots


def size(path: Path) -> tuple[int, ...]:
    """Width and height in pixels."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def sweep(scale: float) -> Results:
    rows = [
        row(
            {"gpuback": scale * B, "A": 2e-6 * B, "bare products": 1e-7 * B},
            case=f"64:{B}", label=f"64-32-10, B = {B}, Adam", batch_size=B, flops=100 * B, bytes=40 * B,
        )
        for B in (64, 512, 4096)
    ]  # fmt: skip
    return results(rows)


def test_plots_have_one_size_whatever_the_figures(tmp_path: Path) -> None:
    first, second = (draw(sweep(scale), tmp_path / str(scale), "x") for scale in (1e-6, 3e-3))
    assert [path.name for _, path in first] == ["x-roofline.png", "x-best-peer.png", "x-batch.png"]
    assert [size(path) for _, path in first] == [size(path) for _, path in second]
    assert len(list((tmp_path / "1e-06").iterdir())) == 3  # nothing is left beside them


def test_nothing_is_drawn_without_figures(tmp_path: Path) -> None:
    memory = row({"gpuback": 1e6, "A": 1e6}, family="memory", unit="bytes", flops=0)
    uncounted = row({"gpuback": 1e-3, "A": 1e-3}, family="startup", flops=0, bytes=0)
    alone = row({"gpuback": 1e-3}, flops=0, bytes=0)
    assert draw(results([memory, uncounted, alone]), tmp_path / "plots", "x") == []
    assert not (tmp_path / "plots").exists()


def test_ceilings_may_be_missing(tmp_path: Path) -> None:
    made = sweep(1e-6)
    made.ceilings = {"copy": 1e10}
    assert len(draw(made, tmp_path, "x")) == 3
    made.ceilings = {}
    assert len(draw(made, tmp_path, "x")) == 2


def test_what_a_case_is_called() -> None:
    assert described(row({})) == "small: 64-32-10, B = 128, Adam"
    assert described(row({}, case="64-32-10:128")) == "64-32-10, B = 128, Adam"
    assert described(row({}, case="import", label="64-32-10, B = 128, import")) == "64-32-10, B = 128, import"


def test_a_label_without_its_batch_size() -> None:
    assert without_batch(row({})) == "64-32-10, Adam"
    assert without_batch(row({}, label="128 × 64 × 32 (B × nO × nI)")) == "64 × 32 (nO × nI)"


def test_labels_keep_their_distance() -> None:
    assert spread_out([0.1, 0.5], 0.1) == [0.1, 0.5]
    assert spread_out([0.5, 0.5, 0.9], 0.1) == [0.5, 0.6, 0.9]
    assert spread_out([0.95, 0.97, 1.2], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert spread_out([0.2] * 5, 0.5) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
