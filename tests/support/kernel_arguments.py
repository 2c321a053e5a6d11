"""Arguments of a kernel by the order of its parameters, for tests that launch many small kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuback._cuda.sources import parameter_names


def by_name(source: Path, entry: str, arguments: Any) -> dict[str, Any]:
    """As many arguments as are given, under the names of the kernel's first parameters."""
    return dict(zip(parameter_names(source.read_text(encoding="utf-8"), entry), arguments, strict=False))
