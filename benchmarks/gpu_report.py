"""What benchmarks on a GPU leave behind: lines as they come, a JSON file with every figure, tables in Markdown.

python -m benchmarks.gpu_report FILE.json     writes FILE.md anew, and prints a short table
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

UNITS = {"bandwidth": ("copy", 1e12, "TB/s"), "bfloat16": ("bfloat16 products", 1e12, "TFLOP/s")} | {
    name: (f"{name} products", 1e12, "TFLOP/s") for name in ("tf32", "float32")
}
PACKAGES = ("gpuback", "numpy", "cupy-cuda13x", "cupy-cuda12x", "cupy", "torch", "triton", "ml_dtypes")


def environment() -> dict[str, Any]:
    """Which device, versions and commit the figures belong to."""
    import cupy

    import gpuback

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    versions = {"python": platform.python_version(), "gpuback": gpuback.__version__}
    for package in PACKAGES:
        try:
            versions.setdefault(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": properties["name"].decode(),
        "multiprocessors": properties["multiProcessorCount"],
        "cuda": {"driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion()},
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("GPUBACK_COMMIT") or _commit(),
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or None


class Report:
    """Figures as they come in; kept after each row, so that a run that is cut short leaves what it has."""

    def __init__(self, ceilings: dict[str, float], path: Path | None) -> None:
        self._path = path
        self.content: dict[str, Any] = {**environment(), "ceilings": ceilings, "layers": [], "host": {}, "steps": []}
        print(heading(self.content), flush=True)

    def add_layer(self, row: dict[str, Any]) -> None:
        self.content["layers"].append(row)
        times = "  ".join(f"{name} {spread['median'] * 1e6:.1f}" for name, spread in row["seconds"].items())
        print(f"{row['precision']:<9} {_shape(row):<20} {times} µs", flush=True)
        for name, reason in row["failures"].items():
            print(f"    {name}: {reason}", flush=True)
        self._keep()

    def add_host_costs(self, costs: dict[str, Any]) -> None:
        self.content["host"] = costs
        print("host: " + "  ".join(f"{name} {spread['median'] * 1e6:.1f}" for name, spread in costs.items()) + " µs")
        self._keep()

    def add_step(self, row: dict[str, Any]) -> None:
        self.content["steps"].append(row)
        times = "  ".join(f"{name} {spread['median'] * 1e6:.1f}" for name, spread in row["seconds"].items())
        print(f"{row['dtype']:<9} {_network(row):<34} {times} µs", flush=True)
        for name, reason in row["failures"].items():
            print(f"    {name}: {reason}", flush=True)
        self._keep()

    def finish(self) -> None:
        show(self.content)
        print(in_short(self.content))

    def _keep(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        self._path.with_suffix(".md").write_text(markdown(self.content), encoding="utf-8")


# ---- In words and tables


def heading(content: dict[str, Any]) -> str:
    ceilings = [
        f"{UNITS[name][0]} {value / UNITS[name][1]:.3g} {UNITS[name][2]}" for name, value in content["ceilings"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        f"{content['device']}, {content['multiprocessors']} multiprocessors; {content['date']}; "
        f"commit {content['commit'] or 'unknown'}.\n{versions}, CUDA {content['cuda']['runtime']}, driver "
        f"{content['cuda']['driver']}.\nCeilings: {', '.join(ceilings)}."
    )


def _shape(row: dict[str, Any]) -> str:
    return "{} × {} × {}".format(*row["shape"])


def _network(row: dict[str, Any]) -> str:
    return f"{'-'.join(map(str, row['sizes']))}, B = {row['batch_size']}"


def _micro(spread: dict[str, float] | None) -> str:
    return "–" if spread is None else f"{spread['median'] * 1e6:.1f}"


def _micros(spread: dict[str, float]) -> str:
    return f"{spread['median'] * 1e6:.1f} ({spread['p20'] * 1e6:.1f}–{spread['p80'] * 1e6:.1f})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _names(rows: Iterable[dict[str, Any]], leave_out: Sequence[str] = ()) -> list[str]:
    return [name for name in dict.fromkeys(n for row in rows for n in row["seconds"]) if name not in leave_out]


def layer_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Its first line is the heading."""
    others = _names(rows, ("gpuback",))
    lines = [
        ["B × nO × nI", "gpuback µs (p20–p80)", "TFLOP/s", "GB/s", "of the roofline", *others, "best peer ÷ gpuback"]
    ]
    for row in rows:
        bound = "" if row["roofline"] is None else f" ({row['bound_by']})"
        lines.append(
            [
                *(_shape(row), _micros(row["seconds"]["gpuback"]), _number(row["tflops"], ".1f")),
                *(_number(row["gbs"], ".0f"), _number(row["roofline"], ".0%") + bound),
                *(_micro(row["seconds"].get(name)) for name in others),
                _number(row["ratio"], ".2f"),
            ]
        )
    return lines


def step_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    names = _names(rows)
    return [
        ["network", *names],
        *([_network(row), *(_micro(row["seconds"].get(name)) for name in names)] for row in rows),
    ]


def sections(content: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Title and table of each part."""
    found = []
    for precision in dict.fromkeys(row["precision"] for row in content["layers"]):
        rows = [row for row in content["layers"] if row["precision"] == precision]
        found.append((f"A layer's backward pass, {precision}, µs", layer_table(rows)))
    if content["host"]:
        rows = [[name, _micros(spread)] for name, spread in content["host"].items()]
        found.append(("What a call costs the host, µs", [["call", "median (p20–p80)"], *rows]))
    for dtype in dict.fromkeys(row["dtype"] for row in content["steps"]):
        rows = [row for row in content["steps"] if row["dtype"] == dtype]
        found.append((f"A training step with Adam, {dtype}, µs", step_table(rows)))
    return found


NOTES = """ReLU below; random data. Each contestant goes through sets of buffers that together exceed the level-2 cache,
and they take turns, round by round. "gpuback" is the one launch in a CUDA graph, as PyTorch's graphs are; "eager",
"CuPy" and `gpuback.fused_backward` are wall-clock times of call after call, launching included. "Of the roofline" is
the least time over the time taken: operands read once and results written once at the speed of a large copy, or
operations at the rate of a large matrix product, whichever takes longer. "Best peer ÷ gpuback" compares times. PyTorch
and CuPy round 16-bit layers' dW to 16 bits; gpuback keeps it in float32.
"""


def markdown(content: dict[str, Any]) -> str:
    parts = [f"# {content['device']}\n", heading(content) + "\n", *content.get("notes", []), NOTES]
    for title, (head, *rows) in sections(content):
        parts.append(f"## {title}\n")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n")
    failures = {
        f"{name}: {why}" for row in content["layers"] + content["steps"] for name, why in row["failures"].items()
    }
    if failures:
        parts.append("## What did not run\n\n" + "\n".join(f"- {failure}" for failure in sorted(failures)) + "\n")
    return "\n".join(parts)


def in_short(content: dict[str, Any]) -> str:
    """One line: how many times as fast as the best peer, layer by layer."""
    ratios: dict[str, list[str]] = {}
    for row in content["layers"]:
        ratios.setdefault(row["precision"], []).append(_number(row["ratio"], ".2f"))
    return "best peer ÷ gpuback: " + ", ".join(f"{name} {' '.join(numbers)}" for name, numbers in ratios.items())


def show(content: dict[str, Any]) -> None:
    """Prints the tables, by rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(content))
        return
    console = Console(width=None if sys.stdout.isatty() else 170)
    for title, (head, *rows) in sections(content):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def plain(content: dict[str, Any]) -> str:
    lines = []
    for title, table in sections(content):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", title, *("  ".join(map(str.rjust, row, widths)) for row in table)]
    return "\n".join(lines)


def main() -> None:
    (path,) = map(Path, sys.argv[1:])
    content = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    show(content)
    print(in_short(content))


if __name__ == "__main__":
    main()
