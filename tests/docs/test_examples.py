"""docs/examples: each runs, says how to run it, and is short."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NEED_PEERS = {"pytorch_layer.py"}
"""tests/peers runs these."""


def name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in NEED_PEERS], ids=name)
def test_the_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_the_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert 20 <= len(text.splitlines()) <= 40
    assert f"Run: python docs/examples/{path.name}\n" in (ast.get_docstring(ast.parse(text)) or "")


def test_a_second_run_of_training_continues_from_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / "train.py"))
    first = capsys.readouterr().out
    runpy.run_path(str(FOLDER / "train.py"))
    assert capsys.readouterr().out == first
