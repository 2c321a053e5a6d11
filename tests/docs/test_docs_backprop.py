"""docs/backprop.md says what is so: its code runs, and its links lead to files and names that exist."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backprop.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", TEXT)
PYTHON = [(TEXT.count("\n", 0, block.start()) + 2, block[2]) for block in FENCE.finditer(TEXT) if block[1] == "python"]
LINKS = sorted({(link[1], link[2]) for link in re.finditer(r"(?<!!)\[([^\]]+)\]\(([^)#]+)\)", PROSE)})
FIGURES = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PROSE)
INLINE_CODE = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))


@functools.cache
def run_page() -> tuple[dict[str, Any], list[str]]:
    """The namespace after all blocks, run in order, and what they printed. Tracebacks show the page's line numbers."""
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line, block in PYTHON:
            exec(compile("\n" * (line - 1) + block, PAGE, "exec"), namespace)
    return namespace, printed.getvalue().splitlines()


def test_every_code_block_runs() -> None:
    assert PYTHON
    run_page()


def test_printed_numbers_are_those_in_the_comments() -> None:
    print_with_comment = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)
    expected = [comment for _, block in PYTHON for comment in print_with_comment.findall(block)]
    _, printed = run_page()
    assert expected
    assert printed == expected


@pytest.mark.parametrize(("text", "target"), LINKS)
def test_links_lead_to_what_they_name(text: str, target: str) -> None:
    """[`name`](file.py) names something that is defined in that module; any other link just leads to a file."""
    path = (PAGE.parent / target).resolve()
    assert path.is_file()
    if not text.startswith("`"):
        return
    parts = path.relative_to(PAGE.parents[1]).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    first, *rest = text.strip("`").split(".")
    found = getattr(module, first)
    assert getattr(found, "__module__", module.__name__) == module.__name__, f"{first} is only imported there"
    for name in rest:
        assert hasattr(found, name) or name in getattr(found, "__dataclass_fields__", {}), f"{found} has no {name}"
        found = getattr(found, name, None)


def test_attributes_in_the_prose_exist() -> None:
    """`net.x`, `t.x`, `gradients.x` and `gpuback.x` outside the code blocks."""
    namespace, _ = run_page()
    attribute = re.compile(r"\b(gpuback|net|t|gradients)\.(\w+)")
    named = [pair for code in INLINE_CODE for pair in attribute.findall(code)]
    assert named
    missing = [f"{owner}.{name}" for owner, name in named if not hasattr(namespace[owner], name)]
    assert not missing


@pytest.mark.parametrize("target", FIGURES)
def test_figures_exist(target: str) -> None:
    figure = PAGE.parent / target
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 100_000


def test_every_figure_file_is_shown() -> None:
    assert sorted(FIGURES) == sorted(f"figures/{path.name}" for path in (PAGE.parent / "figures").glob("*.png"))
