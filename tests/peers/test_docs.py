"""The pages on other libraries, each run from top to bottom, and the examples that need them."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("page", ["pytorch.md", "onnx.md", "streaming.md"])
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "example"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:  # line numbers of tracebacks are the page's
        exec(compile("\n" * text.count("\n", 0, block.start(1)) + block[1], DOCS / page, "exec"), namespace)


def test_the_example_with_pytorch_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(DOCS / "examples" / "pytorch_layer.py"), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["gpuback._torch.module", "gpuback.onnx"])
def test_examples_in_docstrings_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
