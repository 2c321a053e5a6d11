"""Nsight Compute on gpuback's slowest cases: what its kernels for Hopper wait for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.hopper.tables import read, results_of
from benchmarks.reports.results import OURS, Results, roofline
from gpuback._cuda.hopper import SWITCH

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
LAUNCH = "import json, sys; from benchmarks.hopper.gpu_times import called; called(**json.loads(sys.argv[1]))"
NCU_SECONDS = 30.0
"""For one case."""


def profile(log: Path, seconds: float) -> int:
    """Profile one launch of each case, the one farthest from the roofline first; return an exit status.

    What the profiler prints goes into a file beside the log, and its findings onto standard output.
    """
    tool = shutil.which("ncu")
    if tool is None:
        print("profile: ncu is not installed; it comes with the CUDA toolkit")
        return 0
    end, profiled = time.monotonic() + seconds, 0
    for arguments in slowest_first(results_of(read(log))):
        left = end - time.monotonic()
        if left < NCU_SECONDS / 3:
            break
        profiled += _profiled(tool, arguments, log.with_suffix(".ncu.txt"), min(NCU_SECONDS, left))
    print(f"{profiled} cases profiled")
    return 0


def slowest_first(results: Results) -> list[dict[str, Any]]:
    """List the arguments of `gpu_times.called` for the cases that kernels for Hopper ran."""
    ran = [row for row in results.rows if OURS in row.contestants and "wgmma" in row.contestants[OURS].setting]
    found = []
    for row in sorted(ran, key=lambda row: roofline(row, results.ceilings) or 0.0):
        size: Any = row.batch_size if row.family == "step" else [row.batch_size, row.sizes[1], row.sizes[0]]
        found.append({"family": row.family, "size": size})
    return found


def _profiled(tool: str, arguments: Mapping[str, Any], file: Path, limit: float) -> bool:
    command = [
        tool,
        "--clock-control",
        "none",
        "--kernel-name",
        "regex:wgmma",
        "--launch-skip",
        "1",
        "--launch-count",
        "1",
    ]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, "-c", LAUNCH, json.dumps(arguments)]
    print(f"== ncu {json.dumps(arguments)}", flush=True)
    try:
        done = subprocess.run(
            command, env={**os.environ, SWITCH: "1"}, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit:.0f} s")
        return False
    with file.open("a", encoding="utf-8") as out:
        out.write(f"== {json.dumps(arguments)}\n{done.stdout}{done.stderr}\n")
    kept = [
        line
        for line in done.stdout.splitlines()
        if any(word in line for word in ("wgmma", "Throughput", "Duration", "OPT"))
    ]
    print("\n".join(kept) or done.stderr[-500:])
    return done.returncode == 0
