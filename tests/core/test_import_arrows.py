"""Imports go downwards: from room to room in one order, never in a circle of files, and never to optional libraries.

Counted are all imports in a file, those within functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gpuback

PACKAGE = Path(gpuback.__file__).parent

LEVELS = (
    ("_text", "_interrupted_start"),
    ("errors",),
    ("_core",),
    ("_cuda",),
    ("_backends",),
    ("_network",),
    ("losses", "schedules"),
    ("_training",),
    ("_gates", "_torch", "__init__"),
    ("testing", "datasets", "torch", "sklearn", "onnx", "tensorboard"),
    ("_cli",),
    ("__main__",),
)
"""Rooms and public modules, the lowest first. A file imports from its own room and from lower levels."""

OPTIONAL = {
    *("cupy", "hypothesis", "jax", "matplotlib", "mpi4py", "onnx", "pandas", "pytest", "rich", "scipy", "sklearn"),
    *("tensorboardX", "torch", "typer"),
}


def files() -> dict[str, Path]:
    """Every file of the package by the name of its module; `gpuback.__init__` for the package itself."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        inner = parts[-1] == "__init__" and len(parts) > 2
        found[".".join(parts[:-1] if inner else parts)] = path
    return found


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The package's own modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inner]
        else:
            continue
        found |= {"gpuback.__init__" if name == "gpuback" else name for name in names if name.startswith("gpuback")}
    return found


MODULES = files()
ARROWS = {name: imports(path, MODULES) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def level(module: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room(module) in rooms)


def test_every_room_has_a_level() -> None:
    assert {room(module) for module in MODULES} == {name for rooms in LEVELS for name in rooms}


def test_imports_go_downwards() -> None:
    upwards = [
        f"{source} imports {target}"
        for source, targets in ARROWS.items()
        for target in targets
        if room(source) != room(target) and level(source) <= level(target)
    ]
    assert sorted(upwards) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_protocol_imports_no_backend() -> None:
    assert {room(target) for target in ARROWS["gpuback._backends.protocol"]} == {"_core"}


def test_importing_gpuback_brings_in_no_optional_library() -> None:
    script = f"import sys, gpuback; print(sorted({OPTIONAL!r} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
