"""What benchmarks are made into: pages, plots and a README's table."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path

import pytest
from support.made_up_results import results, row

from benchmarks.cases.selection import jobs
from benchmarks.harness.processes import ROOT
from benchmarks.reports.compare import compare
from benchmarks.reports.markdown import described, page, quantity, rate, short_table, spread
from benchmarks.reports.plot_layout import spread_out, without_batch
from benchmarks.reports.plots import draw
from benchmarks.reports.report import BEGIN, END, MarkerError, report
from benchmarks.reports.results import Figures, Results, ResultsError, load, row_of, save
from benchmarks.reports.summary import in_short

KEPT = ROOT / "benchmarks" / "results"


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


def test_slowdowns_are_quotients_of_the_same_round() -> None:
    label = "64-32-10, B = 128, SGD"
    rows = [
        row({"gpuback": seconds, **others}, family="busy", label=f"{label}, {beside}, {figure}")
        for beside, figure, seconds, others in (
            ("quiet", "median", 1e-3, {"A": 1e-3}),
            ("quiet", "95th percentile", 2e-3, {"A": 1e-3}),
            ("2 busy", "median", 3e-3, {"A": 1.5e-3}),
            ("2 busy", "95th percentile", 8e-3, {}),
        )
    ]
    line = next(line for line in page(results(rows)).splitlines() if line.startswith(f"| small: {label}, 2 busy |"))
    assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == ["3.00; 4.00", "1.50; –"]


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
    assert spread(Figures([1e-3, 1e-3, 1e-3], "", "ours"), "s") == "1.00 ms (1.00–1.00)"
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
    text = (ROOT / "README.md").read_text(encoding="utf-8")
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


# ---- Figures that are kept


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.md")), ids=lambda path: path.stem)
def test_a_kept_page_is_that_of_its_figures(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == page(load(path.with_suffix(".json")), re.findall(r"!\[(.*)\]\((.*)\)", text))


def test_figures_of_an_earlier_format_say_so() -> None:
    found = load(KEPT / "h200.json")
    assert found.environment.commit == "9d5c41e" and "Converted from an earlier format" in found.notes[1]
    assert all(len(figures.rounds) == 1 for row in found.rows for figures in row.contestants.values())
    ours = {row.contestants["gpuback"].setting for row in found.rows}
    assert all(setting.endswith("of that commit") for setting in ours)


def test_a_file_of_another_format_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.json").write_text('{"device": "A GPU"}')
    with pytest.raises(ResultsError, match=r"old\.json: format: expected 1, got null"):
        load(tmp_path / "old.json")
    assert compare(tmp_path / "old.json", tmp_path / "old.json") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_round_trip(tmp_path: Path) -> None:
    rows = [row_of(case) for job in jobs("cuda") for case in job.cases]
    for notes in ([], ["A note."]):
        made = dataclasses.replace(results(rows), notes=notes)
        save(tmp_path / "x.json", made)
        assert ("notes" in (tmp_path / "x.json").read_text()) == bool(notes)
        assert load(tmp_path / "x.json") == made
    assert "\nA note.\n" in page(made)
    assert in_short(made) == "no row has gpuback and a peer"
