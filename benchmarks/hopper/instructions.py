"""Tests of instructions, in a process that the next row replaces if one of them fails: it may have broken the GPU."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest


def tested(file: str, expression: str) -> dict[str, Any]:
    """Run the tests of a file that are marked `gpu` and fit pytest's expression.

    Raises:
        RuntimeError: one failed; the message holds pytest's first explanations.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-W", "default", "-m", "gpu", "-k", expression, file])
    lines = [line for line in printed.getvalue().splitlines() if line.strip()]
    if code:
        why = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
        raise RuntimeError(f"{'; '.join(why[:3]) or lines[-1:]}")
    told = [line for line in lines if "mean error" in line or line.startswith("    ")]
    return {"said": "\n".join([lines[-1], *told]) if lines else "no output"}
