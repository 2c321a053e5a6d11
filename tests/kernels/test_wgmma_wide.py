"""Wide layers on the kernels for Hopper, in the checking emulator: which layers go there, results within the contract's
tolerance, the same bits on any grid and in any schedule, planted bugs, and the bytes that are moved.

Tiles are 128 x 256 and stages 64 deep. Ragged layers here have parts of a tile in each direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emulator import EmulationError, EmulatorLauncher, GuardedNumpy
from support.kernel_layers import HOPPER, PRECISIONS, Layer, laid_out
from support.planted import planted
from support.requirements import require_emulator

from gpuback._backends.cuda import layer_plans, wgmma_plans, wgmma_wide_plans
from gpuback._backends.cuda.ops import CudaOps
from gpuback._core.activations import ACTIVATIONS

require_emulator()

SIXTEEN_BIT = ("bfloat16", "float16")
SCHEDULES = [("fifo", "late"), ("lifo", "early"), ("random", "random")]
FEW_BLOCKS = replace(HOPPER, multiprocessors=3)  # several work tiles for each; splits of one tile on several blocks
RAGGED = (300, 200, 300)  # two splits
SPLIT = (900, 140, 270)  # four splits, in two groups
SOURCE = "layer/layer_wgmma.cu"
PLANS = (layer_plans.layer_plan, layer_plans.delta_plan, layer_plans.forward_plan)


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans send layers here that are too narrow or too small for it."""
    monkeypatch.setattr(wgmma_plans, "WIDEST", 0)
    monkeypatch.setattr(wgmma_wide_plans, "FEWEST_WORK_TILES", 1)
    monkeypatch.setattr(wgmma_wide_plans, "FEWEST_OUTPUTS", 1)
    for plan in PLANS:
        plan.cache_clear()
    yield
    for plan in PLANS:
        plan.cache_clear()


def launcher_of(order: str, copies: str, **choices: Any) -> EmulatorLauncher:
    return EmulatorLauncher(order, copies=copies, **({"limits": FEW_BLOCKS, "checked": True} | choices))


# ---- Which layers go there


@pytest.mark.parametrize(
    "shape, backward, forward",
    [
        ((8192, 1024, 1024), "layer_wgmma", "forward_wgmma"),
        ((8192, 4096, 4096), "layer_wgmma", "forward_wgmma"),
        ((8192, 300, 257), "layer_wgmma", "forward_wgmma"),
        ((8192, 64, 4096), "layer_wgmma_narrow", "forward_mma"),
        ((256, 512, 512), "layer_mma", "forward_mma"),
        ((64, 257, 1), "layer_mma", "forward_mma"),
    ],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_wide_layers_of_16_bits_go_there_if_the_device_may(shape, backward, forward, precision):
    found = [plan(*shape, PRECISIONS[precision], HOPPER).launch.variant.entry for plan in PLANS]
    if precision in SIXTEEN_BIT:
        assert found == [backward, backward, forward]
    else:
        assert not any("wgmma" in entry for entry in found)
    for plan in PLANS:
        assert not plan(*shape, PRECISIONS[precision], replace(HOPPER, wgmma=False)).launch.variant.wgmma


@pytest.mark.parametrize("batch_size", [1, 100, 1000, 2**13 - 1, 2**13, 2**16, 2**20])
@pytest.mark.parametrize("n_out, n_in", [(257, 1), (512, 512), (1000, 3000), (4096, 4096)])
def test_chains_are_as_long_as_the_contract_lets_them(batch_size, n_out, n_in):
    plan = wgmma_wide_plans.layer_plan(batch_size, n_out, n_in, PRECISIONS["bfloat16"], HOPPER)
    rows, splits = plan.split.rows_per_split, plan.split.splits
    assert rows % 64 == 0 and 256 <= rows <= (2048 if batch_size < 8192 else 4096)
    assert (splits - 1) * rows < batch_size <= splits * rows
    assert plan.launch.grid <= HOPPER.multiprocessors and plan.launch.shared_bytes <= HOPPER.shared_bytes


def test_the_split_is_the_designs_and_dw_keeps_it_without_da_prev():
    def split(*shape: int, **options: Any) -> tuple[int, int]:
        split = layer_plans.layer_plan(*shape, PRECISIONS["bfloat16"], HOPPER, **options).split
        return split.splits, split.rows_per_split

    assert split(8192, 1024, 1024) == split(8192, 1024, 1024, need_da_prev=False) == (4, 2048)
    assert split(8192, 4096, 4096) == (2, 4096)


def test_explanations_name_the_kernel_and_the_switch():
    ops = CudaOps(np, EmulatorLauncher(limits=HOPPER))
    said = ops.explain_backward(8192, 1024, 1024, PRECISIONS["bfloat16"], need_da_prev=True)
    assert said.startswith("layer_wgmma, one launch by TMA and wgmma (GPUBACK_HOPPER): 384 tiles of 128 x 256")
    assert ops.explain_forward(8192, 1024, 1024, PRECISIONS["bfloat16"]).startswith("forward_wgmma, 132 blocks")


# ---- Results


@pytest.mark.thorough
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
@pytest.mark.parametrize("shape", [RAGGED, SPLIT, (1, 1, 1), (65, 129, 257), (130, 64, 512)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_pass_in_every_schedule_and_at_any_alignment(shape, precision, activation, every_layer):
    layer, backward, forward = Layer(*shape, precision, activation), set(), set()
    for (order, copies), layout in zip(SCHEDULES, ("padded", "tight", "odd"), strict=True):
        launcher = launcher_of(order, copies)
        gradients = layer.backward(launcher, layout=layout)
        out = layer.forward(launcher)
        assert {v.entry for v in launcher.variants} - {"copy_elements"} == {"layer_wgmma", "forward_wgmma"}
        backward.add(gradients.bits())
        forward.add(out.tobytes())
    layer.check(gradients)
    if activation == "relu":
        layer.check_forward(out)
    assert len(backward) == len(forward) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_activations_with_other_epilogues(activation, every_layer):
    layer = Layer(*RAGGED, "bfloat16", activation)
    launcher = launcher_of("random", "random")
    layer.check(layer.backward(launcher))
    layer.check_forward(layer.forward(launcher))


@pytest.mark.thorough
def test_bits_do_not_depend_on_the_grid_or_on_who_runs_when(every_layer):
    layer, bits = Layer(*SPLIT, "bfloat16", "relu"), set()
    for seed, count in enumerate((1, 3, 7, 132)):
        limits = replace(HOPPER, multiprocessors=count)
        for order, copies in SCHEDULES:
            launcher = launcher_of(order, copies, limits=limits, seed=seed, resident_blocks=4, checked=False)
            bits.add((layer.backward(launcher).bits(), layer.forward(launcher).tobytes()))
    assert len(bits) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("precision", SIXTEEN_BIT)
def test_small_integers_are_exact(precision, every_layer):
    layer = Layer(*SPLIT, precision, "identity", "integers")
    dW, db, da_prev = layer.backward(launcher_of("random", "random"), before=3.0)
    da, h_prev, W = (x.astype(np.int64) for x in (layer.operands.da, layer.operands.h_prev, layer.operands.W))
    np.testing.assert_array_equal(dW, da.T @ h_prev + 3)
    np.testing.assert_array_equal(db, da.sum(axis=0) + 3)
    np.testing.assert_array_equal(da_prev, (da @ W).astype(da_prev.dtype))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mixed", "positive"])
def test_tensor_cores_that_cut_off_in_the_longest_chains(kind, every_layer, monkeypatch):
    monkeypatch.setattr(wgmma_wide_plans, "WORK_TILES_WANTED", 1)
    layer = Layer(8192, 24, 40, "bfloat16", "identity", kind)
    layer.check(layer.backward(launcher_of("fifo", "late", truncate=True, checked=False)))


@pytest.mark.thorough
def test_gradients_without_da_prev_are_those_of_the_whole_pass(every_layer):
    layer = Layer(*SPLIT, "bfloat16", "relu")
    whole, alone = (layer.backward(launcher_of("random", "random"), need_da_prev=need) for need in (True, False))
    assert [x.tobytes() for x in whole[:2]] == [x.tobytes() for x in alone[:2]]


@pytest.mark.thorough
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_da_of_the_layer_below_by_itself_has_the_bits_of_the_whole_pass(activation, every_layer):
    """With g' from h, with g' from a, and in float32 at the network's input, by a scale."""
    batch_size, n_out, n_in = 150, 200, 299
    layer, precision = Layer(batch_size, n_out, n_in, "bfloat16", activation or "identity"), PRECISIONS["bfloat16"]
    g = None if activation is None else ACTIVATIONS[activation]
    operands = layer.operands
    da, h, W, a = (laid_out(x, "padded") for x in (operands.da, operands.h_prev, operands.W, operands.a_prev))
    source = None if g is None else a if g.derivative_from == "a" else h
    found = []
    for whole in (True, False):
        ops = CudaOps(GuardedNumpy(), launcher_of("random", "random"))
        workspace = ops.workspace(batch_size, (n_in, n_out), precision)
        dtype = precision.accumulator if g is None else h.dtype
        da_prev = laid_out(np.full((batch_size, n_in), np.nan, dtype), "padded")
        dW, db = ops.empty((n_out, n_in), precision.accumulator), ops.empty(n_out, precision.accumulator)
        if whole:
            ops.bind_backward(da, W, da_prev, g, source, 4.0, workspace)(h, dW, db, False)
            exact = da.astype(np.float64).T @ h.astype(np.float64) / 4
            np.testing.assert_allclose(dW, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
        else:
            ops.bind_delta(da, W, da_prev, g, source, 4.0, workspace)()
        found.append(da_prev)
    assert found[0].tobytes() == found[1].tobytes()
    if g is None:
        exact = da.astype(np.float64) @ W.astype(np.float64) / 4
        np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


# ---- Bytes


@pytest.mark.thorough
def test_a_tile_reads_its_operands_once_and_results_are_written_once(every_layer):
    batch_size, n_out, n_in = 512, 128, 512
    layer = Layer(batch_size, n_out, n_in, "bfloat16", "gelu")
    launcher = launcher_of("fifo", "late")
    layer.backward(launcher)
    counts, splits, size = launcher.counts, 2, 2
    of_dw, of_da = 2, 4 * 2  # tiles: 1 x 2 in each split, 4 x 2
    assert counts.bytes_read["da_map"] == size * n_out * batch_size * (2 + 2)  # by each column of tiles
    assert counts.bytes_read["h_map"] == size * batch_size * n_in
    assert counts.bytes_read["w_map"] == size * n_out * n_in * 4  # by each row of tiles
    assert counts.bytes_read["source_map"] == counts.bytes_written["da_prev_map"] == size * batch_size * n_in
    assert counts.bytes_written["dw_oi"] == 4 * n_out * n_in and counts.bytes_written["db_o"] == 4 * n_out
    partials = splits * (of_dw * 128 * 256 + 2 * 128) * 4
    assert counts.bytes_written["partials"] == counts.bytes_read["partials"] == partials
    stages = of_dw * splits * 256 // 64 + of_da * n_out // 64
    assert counts.bulk_loads == 6 * stages + of_da * 8 and counts.bulk_stores == of_da * 8
    assert counts.warpgroup_products == stages * 2 * 4


@pytest.mark.thorough
def test_a_forward_tile_reads_its_operands_once(every_layer):
    batch_size, n_out, n_in = 256, 512, 192
    launcher = launcher_of("fifo", "late")
    Layer(batch_size, n_out, n_in, "bfloat16", "gelu").forward(launcher)
    counts, stages = launcher.counts, 2 * 2 * 3
    assert counts.bytes_read["h_map"] == 2 * batch_size * n_in * 2
    assert counts.bytes_read["w_map"] == 2 * n_out * n_in * 2
    assert counts.bytes_written["a_map"] == counts.bytes_written["out_map"] == 2 * batch_size * n_out
    assert counts.bulk_loads == 2 * stages and counts.warpgroup_products == stages * 2 * 4


# ---- Planted bugs

PARTIAL = "  store_partial(sums, packs, partials + split * stride);\n"

BUGS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "a stage is given back before its products are over": (
        "tiles/panel_tile.cuh",
        [
            ("wgmma_wait<1>();  // the step before is over\n", ""),
            ("    if (step) end_stage(at, use - 1);", "    end_stage(at, use);"),
            ("  wgmma_wait<0>();\n  end_stage(at, use - 1);", "  wgmma_wait<0>();"),
        ],
    ),
    "a stage is asked for before it is empty": (
        "tiles/panel_tile.cuh",
        [("  if (use >= STAGES) mbarrier_wait(at.empty(use), parity_of(use - STAGES));\n", "")],
    ),
    "a stage is read before it is full": (
        "tiles/panel_tile.cuh",
        [("    mbarrier_wait(at.full(use), parity_of(use));\n    wgmma_fence();", "    wgmma_fence();")],
    ),
    "da_prev goes to the copy without a fence": ("tiles/panel_tile.cuh", [("  fence_proxy_async();\n", "")]),
    "one thread stores what others have not written": (
        "tiles/panel_tile.cuh",
        [("  fence_proxy_async();\n  consumer_sync(consumer);\n", "  fence_proxy_async();\n")],
    ),
    "a buffer is asked for again before the copy has read it": (
        SOURCE,
        [("      bulk_wait_read<0>();\n      ask_for_source", "      ask_for_source")],
    ),
    "the next tile's source comes before the last da_prev has been read": (
        SOURCE,
        [("        bulk_wait_read<0>();\n        for (int panel", "        for (int panel")],
    ),
    "source is asked for at another column": (
        SOURCE,
        [("full, tile.column0 + panel * 64, tile.row0 +", "full, tile.column0, tile.row0 +")],
    ),
    "da's rows and columns are exchanged": (
        SOURCE,
        [("da, full, tile.weights ? m : k,", "da, full, tile.weights ? k : m,")],
    ),
    "db's warps do not count among a stage's readers": (
        SOURCE,
        [("CONSUMER_WARPS + (n_splits ? DB_WARPS : 0)", "CONSUMER_WARPS")],
    ),
    "a stage is given back before all lanes have seen it": ("tiles/panel_tile.cuh", [("  __syncwarp();\n", "")]),
    "partial results are not published": (
        "common/split_k.cuh",
        [
            (
                f"{PARTIAL}  publish();\n  if (!arrive_last(arrivals + group,",
                f"{PARTIAL}  if (!arrive_last(arrivals + group,",
            )
        ],
    ),
    "a step of K of a transposed operand is taken along the row": (
        "tiles/panel_tile.cuh",
        [("panel_descriptor(b + k * (TRANSPOSED_B ? 128 : 2)", "panel_descriptor(b + k * 2")],
    ),
}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("source, patches", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_found(source, patches, tmp_path, every_layer):
    folder, layer = planted({source: patches}, tmp_path), Layer(*SPLIT, "bfloat16", "relu")
    with pytest.raises((EmulationError, AssertionError)):
        for order, copies in SCHEDULES:
            layer.check(layer.backward(launcher_of(order, copies, folder=folder)))


@pytest.mark.thorough
def test_a_forward_passes_buffer_that_is_not_waited_for_is_found(tmp_path, every_layer):
    patch = ("  if (copies()) bulk_wait_read<BUFFERS - 1>();\n", "")
    folder, layer = planted({"tiles/panel_tile.cuh": [patch]}, tmp_path), Layer(*RAGGED, "bfloat16", "relu")
    with pytest.raises((EmulationError, AssertionError)):
        for order, copies in SCHEDULES:
            layer.check_forward(layer.forward(launcher_of(order, copies, folder=folder)))
