"""What docs/scikit-learn.md and the estimators' docstrings show, run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import gpuback.sklearn.estimators

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scikit-learn.md"

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def test_the_page_runs_as_one():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    exec(compile("\n".join(blocks), "example", "exec"), {"__name__": "example"})


def test_examples_in_docstrings_run():
    result = doctest.testmod(gpuback.sklearn.estimators)
    assert result.attempted == 4
    assert result.failed == 0
