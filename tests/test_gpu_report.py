"""Tables of benchmarks on a GPU are what their figures say; no GPU is needed for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report

RESULTS = sorted((Path(gpu_report.__file__).parent / "results").glob("*.json"))


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median}


def content(**row: Any) -> dict[str, Any]:
    layer = {
        "precision": "bfloat16",
        "shape": [65536, 64, 64],
        "seconds": {"gpuback": spread(2e-5), "PyTorch graph": spread(6e-5)},
        "failures": {"CuPy": "MemoryError: none left"},
        "tflops": 53.7,
        "gbs": 1261.0,
        "roofline": 0.5,
        "bound_by": "bytes",
        "ratio": 3.0,
    }
    step = {
        "sizes": [64, 10],
        "batch_size": 64,
        "dtype": "float32",
        "failures": {},
        "seconds": {"gpuback": spread(1e-4)},
    }
    return {
        "device": "a GPU",
        "multiprocessors": 8,
        "cuda": {"driver": 13000, "runtime": 13000},
        "versions": {"python": "3.12"},
        "date": "2026-01-01",
        "commit": None,
        "ceilings": {"bandwidth": 4.2e12},
        "layers": [layer | row],
        "host": {"one launch": spread(5e-6)},
        "steps": [step],
    }


def test_a_row_says_what_was_measured() -> None:
    for text in (gpu_report.markdown(content()), gpu_report.plain(content())):
        assert "65536 × 64 × 64" in text and "20.0 (18.0–24.0)" in text and "60.0" in text
        assert "50% (bytes)" in text and "3.00" in text
    assert "CuPy: MemoryError: none left" in gpu_report.markdown(content())
    assert gpu_report.in_short(content()) == "best peer ÷ gpuback: bfloat16 3.00"


def test_what_is_not_known_is_a_dash() -> None:
    unknown = content(roofline=None, ratio=None, seconds={"gpuback": spread(2e-5)})
    assert gpu_report.layer_table(unknown["layers"])[1][-2:] == ["–", "–"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_tables_are_those_of_the_kept_figures(path: Path) -> None:
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == gpu_report.markdown(kept)
