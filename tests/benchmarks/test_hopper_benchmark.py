"""Rows of benchmarks/on_hopper.sh without a GPU: every function on small shapes, and what a row's failure leaves.

CuPy is `fake_cupy`; gpuback is its CUDA backend in the emulator of a Hopper device. Nothing here is timed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import fake_cupy
from support.requirements import require_emulator

from benchmarks.hopper import machine, profile, rows, run, tables
from benchmarks.hopper.rows import Row
from benchmarks.hopper.run import Runner
from gpuback._backends.cuda import wgmma_plans
from gpuback._cuda.launch import DeviceLimits

# ---- Functions of rows


@functools.cache
def hopper_ops(wgmma: bool) -> Any:
    from emulator import EmulatorLauncher, StrictNumpy

    from gpuback._backends.cuda.ops import CudaOps

    launcher = EmulatorLauncher("random", copies="random", limits=DeviceLimits((9, 0), 232448, 132, wgmma=wgmma))
    return CudaOps(StrictNumpy(launcher), launcher, name="emulated")


@pytest.fixture
def make() -> Iterator[Any]:
    """What a worker does with a row."""
    require_emulator()
    wgmma = False

    def make(row: Row) -> dict[str, Any]:
        nonlocal wgmma
        wgmma = row.hopper
        return worker.make(row.do, json.loads(json.dumps(row.arguments)))

    with fake_cupy.installed(lambda reproducible: hopper_ops(wgmma)):
        worker = importlib.import_module("benchmarks.hopper.worker")
        yield make


CHECKS = rows.checks(((65, 8, 24), (70, 61, 40)), ((130, 20, 16),), (((6, 9, 5), 20),), seeds=4)
TIMES = [row for row in (*rows.layers([(40, 8, 24)]), *rows.networks([32])) if "gpuback" in row.title]


@pytest.mark.thorough
@pytest.mark.parametrize("row", CHECKS, ids=lambda row: row.title)
def test_each_check(row: Row, make: Any) -> None:
    answer = make(row)
    assert "seeds" in answer["said"] and 0 <= answer.get("worst", 0.5) <= 1


@pytest.mark.thorough
@pytest.mark.parametrize("row", TIMES, ids=lambda row: row.title)
def test_each_time_of_gpuback(row: Row, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("benchmarks.hopper.gpu_times")
    monkeypatch.setattr(timing, "ROUNDS", 3)
    answer = make(row)
    assert len(answer["rounds"]) == 3 and answer["setting"].startswith("CUDA graph")
    kernel = answer["setting"].removeprefix("CUDA graph, ")
    if answer["case"]["family"] == "layer":
        assert kernel == ("layer_wgmma_narrow" if row.hopper else "layer_mma_narrow")
    else:
        assert kernel.endswith("wgmma") or kernel == "fused_step"
    timing.called(row.arguments["family"], row.arguments["size"])


@pytest.mark.thorough
def test_each_time_of_a_forward_pass(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    *of_gpuback, of_pytorch = rows.forward([(140, 24, 40)])
    for row in of_gpuback:
        answer = make(row)
        assert answer["seconds"] > 0 and answer["flops"] == 2 * 140 * 24 * 40
    assert make(of_pytorch) == {"left out": "not installed"}
    forward = importlib.import_module("benchmarks.hopper.gpu_forward")
    monkeypatch.setattr(forward, "ACTIVATIONS", {"relu": forward.ACTIVATIONS["identity"]})
    assert make(of_gpuback[0])["failed"].startswith("check failed: h is off by")


@pytest.mark.thorough
def test_each_knob(make: Any) -> None:
    """Each is back in its place afterwards."""
    before = [getattr(wgmma_plans, name) for name, _ in rows.KNOBS]
    for row in rows.knobs([(130, 8, 24)]):
        answer = make(row)
        assert answer["seconds"] > 0 and answer["constants"] == row.arguments["constants"]
    assert before == [getattr(wgmma_plans, name) for name, _ in rows.KNOBS]


@pytest.mark.thorough
def test_other_libraries_that_are_missing_are_left_out(make: Any) -> None:
    for row in (*rows.layers([(40, 8, 24)]), *rows.networks([32])):
        if "gpuback" not in row.title:
            assert make(row) == {"left out": "not installed"}


@pytest.mark.thorough
def test_wrong_results_fail(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpuback

    right = gpuback.fused_backward

    def wrong(*arrays: Any, **options: Any) -> Any:
        dW, db, da_prev = right(*arrays, **options)
        if da_prev.dtype != np.float64:
            da_prev[3, 2] += da_prev[3, 2] * 0.02 + 0.1
        return dW, db, da_prev

    monkeypatch.setattr(gpuback, "fused_backward", wrong)
    assert "da_prev, seed 0" in make(CHECKS[0])["failed"]
    calls = iter(range(100))

    def moving(*arrays: Any, **options: Any) -> Any:
        dW, db, da_prev = right(*arrays, **options)
        dW[0, 0] += next(calls) * 1e-7
        return dW, db, da_prev

    monkeypatch.setattr(gpuback, "fused_backward", moving)
    assert make(CHECKS[0])["failed"].startswith("check failed: other bits at the second time")


def test_the_rates_of_the_machine(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = make(rows.machine()[1])
    assert answer["ceilings"] == fake_cupy.CEILINGS and answer["environment"]["device"] == "A fake GPU"


def test_structures_have_the_sizes_of_cuda_h() -> None:
    assert ctypes.sizeof(machine.LaunchAttribute) == 72 and machine.LaunchAttribute.dimensions.offset == 8
    assert ctypes.sizeof(machine.LaunchConfig) == 56 and machine.LaunchConfig.stream.offset == 32


# ---- Rows that fail, and runs that are cut short


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs rows of support/trial_rows.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    return functools.partial(Runner, tmp_path / "log", worker="support.trial_rows", say=lambda text: None)


def trial(function: str, *, hopper: bool = True, seconds: float = 20.0, **arguments: Any) -> Row:
    return Row(function, f"trials.{function}", arguments, hopper, seconds)


def kept(log: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(line["title"], next(key for key in ("failed", "left out", "said") if key in line)) for line in lines]


@pytest.mark.thorough
def test_a_row_that_raises_hangs_or_dies_leaves_the_others(runner: Any, tmp_path: Path) -> None:
    bad = [trial("raises"), trial("hangs", seconds=1.0), trial("dies"), trial("is_wrong"), trial("takes_no_part")]
    good = [trial("passes", hopper=hopper, number=number) for number in range(len(bad) + 1) for hopper in (True, False)]
    mixed = [row for pair in zip(good, bad, strict=False) for row in pair] + good[len(bad) :]
    assert runner(seconds=60).run("trial", mixed) == 4
    found = kept(tmp_path / "log")
    assert [title for title, _ in found] == [row.title for row in mixed]
    assert dict(found) == {
        "raises": "failed", "hangs": "failed", "dies": "failed", "is_wrong": "failed", "takes_no_part": "left out",
        "passes": "said",
    }  # fmt: skip
    failures = [json.loads(line).get("failed", "") for line in (tmp_path / "log").read_text().splitlines()]
    for why in ("ZeroDivisionError", "no answer in 1 s", "its process ended", "check failed: off"):
        assert any(why in failure for failure in failures), why


@pytest.mark.thorough
def test_a_process_makes_rows_until_one_breaks_it(runner: Any, tmp_path: Path) -> None:
    """A wrong result breaks nothing. The switch is set in the process of the kernels for Hopper alone."""
    told = [
        trial("tells"),
        trial("is_wrong"),
        trial("tells"),
        trial("raises"),
        trial("tells"),
        trial("tells", hopper=False),
    ]
    runner(seconds=60).run("trial", told)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    process = [line["process"] for line in lines if "process" in line]
    assert process[0] == process[1] != process[2] and len(set(process)) == 3
    assert [line["switch"] for line in lines if "switch" in line] == ["1", "1", "1", "0"]
    for number in process:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.thorough
def test_tests_of_instructions_in_processes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "test_device.py"
    file.write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(capsys):\n    with capsys.disabled():\n"
        "        print('wgmma: mean error of this device 1')\n"
        "@pytest.mark.gpu\ndef test_bad():\n    assert 1 == 2, 'no luck'\ndef test_without_a_gpu(): assert False\n"
    )
    both = [
        Row(name, "instructions.tested", {"file": str(file), "expression": name}) for name in ("test_bad", "test_good")
    ]
    assert Runner(tmp_path / "log", 60, lambda text: None).run("ptx", both) == 1
    bad, good = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert bad["failed"].startswith("RuntimeError: AssertionError: no luck")
    assert "1 passed" in good["said"] and "mean error of this device 1" in good["said"]


@pytest.mark.thorough
def test_no_instruction_is_left_out() -> None:
    """Each test that needs a GPU is in a row, and each row has one."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", str(rows.TESTS[0])]
    root = Path(__file__).parents[2]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    on_gpu = {line.partition("::")[2] for line in listed if "::" in line}
    found = [
        {test for test in on_gpu if all(part in test for part in row.arguments["expression"].split(" and "))}
        for row in rows.ptx()[:-1]
    ]
    assert all(found) and set().union(*found) == on_gpu and len(on_gpu) > 40


@pytest.mark.thorough
def test_a_run_without_time_left_names_what_it_left_out(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FEWEST_SECONDS", 1.0)
    assert runner(seconds=2.5).run("trial", [trial("passes", number=1), trial("hangs"), trial("passes", number=2)]) == 1
    assert [verdict for _, verdict in kept(tmp_path / "log")] == ["said", "failed", "left out"]


@pytest.mark.thorough
def test_a_run_that_is_cut_short_keeps_what_was_measured(runner: Any, tmp_path: Path) -> None:
    def stop(text: str) -> None:
        raise SystemExit("stopped")

    with pytest.raises(SystemExit):
        runner(seconds=60, say=stop).run("trial", [trial("tells"), trial("passes", number=1)])
    (line,) = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    with pytest.raises(ProcessLookupError):
        os.kill(line["process"], 0)


# ---- Parts of the script

PARTS = """
. benchmarks/parts.sh
part good 20 echo fine
part bad 20 bash -c 'echo no luck; exit 3'
part slow 5 bash -c 'echo began $PART_SECONDS; sleep 60'
BUDGET=$((SECONDS + 4)) part late 20 echo never
part other 20 echo never
finish
"""


@pytest.mark.thorough
def test_parts_have_limits_and_verdicts(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    variables = {**os.environ, "OUT": str(tmp_path), "PARTS": "good bad slow late"}
    done = subprocess.run(["bash", "-c", PARTS], cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = [line.split(maxsplit=1) for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == ["good", "bad", "slow", "late"]
    verdicts = dict(lines)
    ends = ("good", "passed", "fine"), ("bad", "FAILED (3)", "no luck"), ("slow", "FAILED (124)", "began 2")
    for name, verdict, last in ends:
        assert verdicts[name].startswith(verdict) and verdicts[name].endswith(last)
    assert verdicts["late"] == "left out for lack of time"
    assert "never" not in (tmp_path / "log.txt").read_text()


# ---- Tables


def timed_line(name: str, hopper: bool, seconds: float, role: str) -> dict[str, Any]:
    case = importlib.import_module("benchmarks.cases.selection").layer((65536, 64, 64), "bfloat16")
    figures = {"rounds": [seconds] * 3, "setting": "CUDA graph, layer_wgmma_narrow"}
    return {"title": name, "hopper": hopper, "case": case.to_json(), "name": name, "role": role, **figures}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"title": "clusters", "clusters": {"8": 16}, "said": "16 of 8 blocks"},
        {"title": "ceilings", "said": "4 TB/s", "ceilings": {"copy": 4e12, "bfloat16": 8e14},
         "environment": {"device": "A GPU", "kind": "gpu", "cores": 132, "commit": "abc", "date": "2026-12-01",
                         "versions": {}, "blas": "cuBLAS 13"}},
        timed_line("gpuback", True, 13e-6, "ours"),
        timed_line("gpuback", False, 25e-6, "ours"),
        timed_line("PyTorch compiled", False, 29e-6, "peer"),
        timed_line("cuBLAS products", False, 20e-6, "floor"),
        {"title": "a check", "failed": "check failed: dW"},
        {"title": "a late row", "left out": "for lack of time"},
    ]  # fmt: skip
    path = tmp_path / "hopper.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"title": "cut o')
    return path


def test_tables_of_a_log_that_was_cut_off(log: Path) -> None:
    page = tables.page(log)
    (row,) = [line for line in page.splitlines() if line.startswith("| 65536 × 64 × 64")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        "layer_wgmma_narrow",
        "13.0",
        "25.0",
        "29.0",
        "20.0",
        "2.23 (PyTorch compiled)",
        "6.30",
        "1.34",
        "48%",
    ]
    for text in ("A GPU, 132", "- clusters: 16 of 8 blocks", "- a check: check failed: dW", "- a late row: for lack"):
        assert text in page


def test_tables_of_a_log_without_rates_or_times(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(json.dumps(timed_line("PyTorch eager", False, 1e-4, "peer")) + "\n")
    assert "| 100 | – | – | – | – |" in tables.page(log)
    log.write_text("")
    assert "unknown" in tables.page(log)


def test_profiles_begin_with_the_case_farthest_from_the_roofline(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tables.results_of(tables.read(log))
    assert profile.slowest_first(results) == [{"family": "layer", "size": [65536, 64, 64]}]
    results.rows[0].contestants["gpuback"].setting = "CUDA graph, layer_mma"
    assert profile.slowest_first(results) == []
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile.profile(log, 10.0) == 0


def test_parts_have_rows_of_functions_that_exist() -> None:
    folder = Path(rows.__file__).parent
    for part in rows.PARTS.values():
        for row in part():
            module, name = row.do.split(".")
            assert f"\ndef {name}(" in (folder / f"{module}.py").read_text()
            assert json.loads(json.dumps(row.arguments)) is not None
