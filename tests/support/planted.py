"""Copies of the kernels' sources with mistakes in them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from emulator.build import KERNELS


def planted(patches: Mapping[str, Sequence[tuple[str, str]]], folder: Path) -> Path:
    """The folder of a copy in which text of a source, which must stand there once, is replaced by other text."""
    shutil.copytree(KERNELS, folder / "kernels")
    for source, changes in patches.items():
        path = folder / "kernels" / source
        text = path.read_text(encoding="utf-8")
        for before, after in changes:
            assert text.count(before) == 1, f"{source} has changed: {text.count(before)} times {before!r}, expected one"
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")
    return folder / "kernels"
