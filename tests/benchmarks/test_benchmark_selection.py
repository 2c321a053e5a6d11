"""Which cases a run measures, and their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cases, peers
from benchmarks.cases import selection
from benchmarks.cases.selection import FAMILIES, FIRST, jobs
from benchmarks.peers import GPU
from benchmarks.reports.results import row_of

SIZES = [cases.network("64-64-10:256"), cases.network("5-7-3:16")]


def test_rows_come_in_the_order_of_their_importance() -> None:
    every = jobs("cuda")
    assert [job.level for job in every] == sorted(job.level for job in every)
    assert {job.family for job in every} == set(FAMILIES["cuda"])
    assert {job.family for job in jobs("cuda", quick=True)} == set(FAMILIES["cuda"]) - {"startup"}
    assert all(job.level == FIRST for job in jobs("cuda", quick=True))
    assert {job.family for job in jobs("cuda", ["loss", "host"])} == {"loss", "host"}


def test_layers_are_of_widths_64_to_8192_and_batches_256_to_262144() -> None:
    layers = [case for job in jobs("cuda", ["layer"]) for case in job.cases]
    widths, batches = {n for case in layers for n in case.sizes}, {case.batch_size for case in layers}
    assert {min(widths), max(widths), min(batches), max(batches)} == {64, 8192, 256, 262144}
    assert {case.dtype for case in layers} == {"bfloat16", "float32", "tf32"}


@pytest.mark.parametrize("device", FAMILIES)
@pytest.mark.parametrize("networks", [None, SIZES])
def test_no_row_is_there_twice(device: selection.Device, networks: list[cases.Network] | None) -> None:
    rows = [row_of(case) for job in jobs(device, networks=networks) for case in job.cases]
    assert {row.family for row in rows} == set(FAMILIES[device])
    assert len(rows) == len({(row.family, row.case, row.label, row.dtype) for row in rows})


def test_sizes_of_ones_own_take_the_place_of_the_usual_ones() -> None:
    steps = [case for job in jobs("cuda", ["step"], SIZES) for case in job.cases]
    assert [(case.sizes, case.batch_size, case.dtype, case.optimizer) for case in steps] == [
        ((64, 64, 10), 256, "float32", "Adam"), ((64, 64, 10), 256, "bfloat16", "Adam"),
        ((5, 7, 3), 16, "float32", "Adam"), ((5, 7, 3), 16, "bfloat16", "Adam"),
    ]  # fmt: skip
    (layer,) = (case for job in jobs("cuda", ["layer"], SIZES[:1], ["tf32"]) for case in job.cases)
    assert (layer.sizes, layer.batch_size, layer.dtype) == ((64, 10), 256, "tf32")
    assert len(jobs("cuda", ["host"], SIZES[:1])) == len(selection.HOST_CALLS)


def test_a_family_without_a_dtype_is_left_out() -> None:
    assert {job.family for job in jobs("cuda", dtypes=["tf32"])} == {"layer", "step"}
    assert {case.dtype for job in jobs("cpu", ["step"], dtypes=["float64"]) for case in job.cases} == {"float64"}
    assert jobs("cuda", ["loss"], SIZES, ["bfloat16"]) == []


def test_steps_beside_busy_processes_and_by_threads() -> None:
    (job, *_) = jobs("cpu", ["busy"], SIZES, beside=3)
    assert [(case.beside, case.percentile) for case in job.cases] == [(0, 50), (0, 95), (3, 50), (3, 95)]
    (job, *_) = jobs("cpu", ["threads"], SIZES, threads=[1, 6])
    assert [case.threads for case in job.cases] == [1, 6]
    assert [selection.powers_of_two(cores) for cores in (1, 2, 3, 4, 6)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6]
    ]  # fmt: skip


def test_flops_are_counted_by_hand() -> None:
    case = jobs("cpu", ["step"], SIZES[1:])[0].cases[0]
    assert case.sizes == (5, 7, 3)
    products = 2 * 16 * (5 * 7 + 7 * 3) * 2 + 2 * 16 * 7 * 3  # forward, dW; dh of the second layer
    assert case.flops == products


def test_everyone_has_an_adapter() -> None:
    folder = Path(peers.__file__).parent
    for one in (*GPU, *peers.GPU_STARTS):
        assert (folder / f"{one.adapter.rpartition('.')[2]}.py").exists()
        assert set(one.families) <= set(FAMILIES["cuda"])
    names = [(one.name, family) for one in GPU for family in one.families]
    assert len(names) == len(set(names))
