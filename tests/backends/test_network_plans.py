"""Launch plans of whole networks: pure functions of shape and device."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from support.kernel_layers import A10, A100, H200

from gpuback._backends.cuda import network_plans
from gpuback._backends.cuda.network_layout import CIRCULAR_BUFFER_BYTES, LAYER, round_up_16
from gpuback._backends.cuda.network_plans import (
    WIDE_TILES_B,
    Refusal,
    StepPlan,
    TwoLaunches,
    fused_plan,
    possible_fused_plan,
)
from gpuback._core.architecture import Architecture
from gpuback._cuda.launch import DeviceLimits
from gpuback._cuda.sources import kernels_folder

DEVICES = {"H200": H200, "A100": A100, "A10": A10, "one multiprocessor": replace(H200, multiprocessors=1)}
DTYPES = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "tf32": {"allow_tf32": True},
    "float32": {},
}
NETWORKS = {
    "one of everything": [1, 1],
    "seven of 64": [64] * 8,
    "twelve of 32": [32] * 13,
    "two of 128": [128] * 3,
    "three of 128": [128] * 4,
    "twenty of 100": [100] * 21,
    "odd": [17, 100, 3, 64, 1],
    "odd and narrow": [1, 31, 2, 17, 32],
}


def architecture(sizes: list[int], dtype: str = "bfloat16", activation: str = "gelu", **options) -> Architecture:
    return Architecture.create(sizes, activation=activation, **DTYPES.get(dtype, {"dtype": dtype}), **options)


def two_launches(network: Architecture, batch_size: int, limits: DeviceLimits) -> TwoLaunches | None:
    passes = network_plans.passes_plan(network, batch_size, limits, backward=True)
    weight_gradients = network_plans.weight_gradients_plan(network, batch_size, limits)
    refused = isinstance(passes, Refusal) or isinstance(weight_gradients, Refusal)
    return None if refused else TwoLaunches(passes, weight_gradients)


# ---- Which way a network goes


@pytest.mark.parametrize(
    "sizes, tile_b",
    [([64] * 8, 128), ([32] * 8, 256), ([32] * 15, 128), ([128] * 3, 128), ([17, 64, 64, 3], 256), ([128, 128], 128)],
)
def test_one_launch_on_an_h200(sizes, tile_b):
    plan = fused_plan(architecture(sizes, activation="relu"), 65536, H200)
    assert isinstance(plan, StepPlan) and plan.tile_b == tile_b


def test_batch_tiles_have_as_many_rows_as_there_is_room_for():
    """Pre-activations are kept for gelu; float32 takes twice the room."""
    seven = [64] * 8
    assert [possible_fused_plan(architecture(seven, dtype, g), 4096, H200).tile_b for dtype, g in [
        ("bfloat16", "tanh"), ("bfloat16", "gelu"), ("float32", "tanh"),
    ]] == [128, 64, 32]  # fmt: skip
    assert isinstance(possible_fused_plan(architecture(seven, "float32", "gelu"), 4096, H200), TwoLaunches)
    assert isinstance(fused_plan(architecture(seven, "bfloat16", "tanh"), 4096, A10), TwoLaunches)


@pytest.mark.parametrize("sizes", [[64] * 10, [32] * 18, [128] * 4, [64, 65, 64, 64, 64], [128] * 30])
def test_two_launches_where_registers_do_not_hold_all_sums(sizes):
    network = architecture(sizes)
    assert isinstance(fused_plan(network, 4096, H200), TwoLaunches)
    known, depth = "14 of 32 or 7 of 64 or 2 of 128", len(sizes) - 1
    reason = f"registers hold the sums of {known} layers, not of {depth} up to {max(sizes)} wide"
    assert network_plans.step_plan(network, 4096, H200) == Refusal(reason)


@pytest.mark.parametrize(
    "network, limits, reason",
    [
        (architecture([64, 129, 10]), H200, "a layer is 129 wide, and whole networks are taken up to 128"),
        (architecture([784, 64, 10]), H200, "a layer is 784 wide, and whole networks are taken up to 128"),
        (architecture([64, 64], "float64"), H200, "float64 goes layer by layer"),
        (architecture([64, 64], "float32", reproducible=True), H200, "reproducible mode goes layer by layer"),
        (
            architecture([64, 64]),
            DeviceLimits((7, 5), 65536, 40),
            "this device has no tensor cores for such operands",
        ),
        (
            architecture([128, 128, 128], "float32", "relu"),
            A10,
            "a block would need 119,184 bytes of shared memory of 101,376",
        ),
    ],
)
def test_layer_by_layer_and_why(network, limits, reason):
    assert fused_plan(network, 4096, limits) == Refusal(reason)


@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_float32_goes_layer_by_layer_where_batch_tiles_would_be_small(dtype):
    """Warps without rows of their own read the same weights; tensor cores do not make up for it."""
    for sizes, width in (([64] * 8, 64), ([3, *[33] * 20], 33)):
        assert fused_plan(architecture(sizes, dtype, "relu"), 4096, H200) == Refusal(
            f"float32 layers of {width} are faster one by one than a network of them, which has no room for batch "
            f"tiles of 128 rows"
        )
    for sizes in ([32] * 8, [3, *[17] * 30], [64, 64, 64, 10]):
        assert not isinstance(fused_plan(architecture(sizes, dtype, "relu"), 4096, H200), Refusal)


def test_float32_needs_no_tensor_cores():
    old = DeviceLimits((7, 0), 98304, 80)
    assert isinstance(fused_plan(architecture([30, 40, 3], "float32"), 4096, old), StepPlan)


# ---- How sums are cut


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("batch_size", [1, 63, 64, 129, 4096, 65536, 1_000_003])
def test_sums_are_cut_by_shape_alone(batch_size, sizes):
    network, cuts = architecture(sizes), set()
    for limits in DEVICES.values():
        one, two = network_plans.step_plan(network, batch_size, limits), two_launches(network, batch_size, limits)
        if isinstance(one, StepPlan):
            cuts.add(("one", one.sums, one.launch.variant))
        cuts |= {
            ("two", two.weight_gradients.sums, two.weight_gradients.launch.variant),
            ("losses", two.passes.split, None),
        }
    assert len({what for what, *_ in cuts}) == len(cuts)
    for split in [cut if what == "losses" else cut.split for what, cut, _ in cuts]:
        rows = split.rows_per_split
        assert (split.splits - 1) * rows < batch_size <= split.splits * rows
        assert rows % 64 == 0 and rows <= 2048
        assert (split.group_size - 1) ** 2 < split.splits <= split.group_size**2


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
def test_grids_follow_the_device(limits):
    network = architecture([64] * 5)
    assert network_plans.step_plan(network, 65536, limits).launch.grid == 128  # a block to a split
    two = two_launches(network, 65536, limits)
    assert two.passes.launch.grid == min(128, 2 * limits.multiprocessors)
    assert two.weight_gradients.launch.grid == min(
        4 * two.weight_gradients.sums.split.splits, 2 * limits.multiprocessors
    )


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
def test_fragments_are_what_warps_find(sizes):
    """As `WeightFragment::is_used` in kernels/network/weight_gradients.cuh: rows and columns begin inside the layer."""
    network = architecture(sizes)
    plans = [network_plans.step_plan(network, 1000, H200), two_launches(network, 1000, H200).weight_gradients]
    for plan in plans:
        if isinstance(plan, Refusal):
            continue
        defines = dict(define.split("=") for define in plan.launch.variant.defines)
        width = int(defines.get("MAX_WIDTH", plan.launch.variant.entry[-3:].strip("_")))
        warps = int(defines.get("WARPS", 8))
        rows, columns = max(width // (warps // 4), 16), width // 4
        places = [(warp // 4 * rows, warp % 4 * columns) for warp in range(warps)]
        found = sum(o < n_out and i < n_in for n_in, n_out in pairwise(sizes) for o, i in places)
        assert plan.launch.block == 32 * warps
        assert plan.sums.fragments == found <= plan.sums.slots == warps * (len(sizes) - 1)
        of_db = max(rows // 32, 1)
        per_lane = rows * columns // 32 + -(-of_db // 4) * 4
        assert plan.sums.partials == plan.sums.split.splits * plan.sums.slots * 32 * per_lane
        groups = -(-plan.sums.split.splits // plan.sums.split.group_size)
        assert plan.sums.counters == 4 + plan.sums.slots * (groups + 1)


# ---- What lies where


def test_the_layout_is_the_kernels_struct():
    texts = [path.read_text(encoding="utf-8") for path in kernels_folder().rglob("*.cuh")]
    (body,) = [match[1] for text in texts for match in re.findall(r"struct (Layer) \{(.*?)\n\};", text, re.DOTALL)]
    fields = []
    for declaration in re.sub(r"//.*", "", body).split(";"):
        kind, _, names = declaration.strip().partition(" ")
        fields += [(name.strip(), kind) for name in names.split(",") if name.strip()]
    assert [(name, "int") for name in LAYER.names] == fields
    assert [LAYER.fields[name] for name in LAYER.names] == [(np.dtype(np.int32), 4 * i) for i in range(len(fields))]
    assert LAYER.itemsize == 4 * len(fields)


def row_bytes(width: int, dtype: str) -> int:
    """Of operands, padded so that fragments are read without bank conflicts."""
    return (
        (round_up_16(width) + 8) * 2
        if dtype in ("bfloat16", "float16")
        else (round_up_16(width) + (8 if dtype == "tf32" else 4)) * 4
    )


def top_row_bytes(width: int, dtype: str) -> int:
    return (round_up_16(width) + (8 if dtype == "tf32" else 4)) * 4


def extents(network: Architecture, dtype: str, layout, rows: int, in_turns: bool) -> list[tuple[int, int, str]]:
    """(first byte, one past the last, name) of everything in shared memory. What takes turns has one name."""
    sizes = network.sizes
    parts = [(0, layout.nbytes, "layout"), (layout.nbytes, layout.nbytes + 32 * 8, "sums of losses")]
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        w, bias, h, a, pitch = (int(layout[name][k]) for name in ("w", "bias", "h", "a", "pitch"))
        assert pitch * (2 if dtype in ("bfloat16", "float16") else 4) == row_bytes(n_in, dtype)
        turn = k % 2 if in_turns else k
        parts.append((w, w + round_up_16(n_out) * row_bytes(n_in, dtype), f"W_{k + 1}"))
        parts.append((bias, bias + 4 * round_up_16(n_out), f"b_{k + 1}"))
        parts.append((h, h + rows * row_bytes(n_in, dtype), f"h_{turn}"))
        parts += [(a, a + rows * row_bytes(n_in, dtype), f"a_{turn}")] if a else []
    top, pitch = int(layout["h"][-1]), int(layout["pitch"][-1])
    assert pitch * (2 if dtype in ("bfloat16", "float16") else 4) == top_row_bytes(sizes[-1], dtype)
    return [*parts, (top, top + rows * top_row_bytes(sizes[-1], dtype), "a_L")]


def check_places(parts: list[tuple[int, int, str]], shared_bytes: int) -> None:
    for first, end, name in parts:
        assert 0 <= first < end <= shared_bytes and first % 16 == 0, name
    for one, other in ((one, other) for i, one in enumerate(parts) for other in parts[:i]):
        assert one[2] == other[2] or one[1] <= other[0] or other[1] <= one[0], (one, other)


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [H200, A10], ids=["H200", "A10"])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_places_do_not_overlap(activation, limits, dtype, sizes):
    network = architecture(sizes, dtype, activation)
    starts = network.layout.weight_starts
    step = network_plans.step_plan(network, 1000, limits)
    for plan in (step, *(network_plans.passes_plan(network, 1000, limits, backward=b) for b in (True, False))):
        if isinstance(plan, Refusal):
            continue
        assert plan.launch.shared_bytes <= limits.shared_bytes and plan.tile_b in WIDE_TILES_B
        assert plan.layout.shape == (len(sizes),) and plan.layout.dtype == LAYER
        assert plan.layout["n_in"].tolist() == sizes and plan.layout["n_out"][:-1].tolist() == sizes[1:]
        assert plan.layout["theta"][:-1].tolist() == list(starts)
        in_turns = plan is not step
        parts = extents(network, dtype, plan.layout, plan.tile_b, in_turns)
        if in_turns and not plan.all_weights:
            # W and b of one layer at a time
            parts = [(first, end, "W" if name[0] in "Wb" else name) for first, end, name in parts]
            for k, (n_in, n_out) in enumerate(pairwise(sizes)):
                w, bias = int(plan.layout["w"][k]), int(plan.layout["bias"][k])
                assert abs(w - bias) >= (
                    4 * round_up_16(n_out) if w > bias else round_up_16(n_out) * row_bytes(n_in, dtype)
                )
        check_places(parts, plan.launch.shared_bytes)
        kept = [bool(place) for place in plan.layout["a"][1:-1]]
        wants = activation == "gelu" and (plan is step or plan.columns > 0)
        assert kept == [wants] * (len(sizes) - 2)
    if isinstance(step, StepPlan):
        assert step.layout["h"][0] + CIRCULAR_BUFFER_BYTES <= step.launch.shared_bytes
        beyond = dict.fromkeys(
            end for _, end, name in extents(network, dtype, step.layout, step.tile_b, False) if name[0] in "Wb"
        )
        assert max(beyond) <= step.layout["h"][0]  # circular buffers lie over the batch tile, not over weights


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_matrices_of_the_workspace_do_not_overlap(activation, sizes):
    network = architecture(sizes, activation=activation)
    plan = network_plans.passes_plan(network, 1000, H200, backward=True)
    depth, columns = len(sizes) - 1, []
    for k, width in enumerate(sizes):
        there = {"row_h": k < depth, "row_a": activation == "gelu" and 0 < k < depth, "row_da": k > 0}
        columns += [(int(plan.layout[name][k]), round_up_16(width)) for name, wanted in there.items() if wanted]
    ends = 0
    for first, width in sorted(columns):
        assert first == ends
        ends = first + width
    assert ends == plan.columns
    forward = network_plans.passes_plan(network, 1000, H200, backward=False)
    assert forward.columns == 0 and not any(forward.layout[name].any() for name in ("row_h", "row_a", "row_da"))


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [H200, A10], ids=["H200", "A10"])
def test_batch_tiles_that_take_turns_and_circular_buffers_fit_in(limits, dtype, sizes):
    network = architecture(sizes, dtype)
    plan = network_plans.weight_gradients_plan(network, 1000, limits)
    if isinstance(plan, Refusal):
        return
    width = 64 if max(sizes) <= 64 else 128
    tiles = 4 * plan.tile_b * row_bytes(width, dtype)
    table = -(-len(sizes) * LAYER.itemsize // 16) * 16
    assert plan.launch.shared_bytes == table + 16 * width + max(tiles, CIRCULAR_BUFFER_BYTES) <= limits.shared_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_room_for_gradients_has_room_without(dtype):
    for sizes in NETWORKS.values():
        for limits in DEVICES.values():
            network = architecture(sizes, dtype)
            if not isinstance(fused_plan(network, 100, limits), Refusal):
                assert not isinstance(network_plans.passes_plan(network, 100, limits, backward=False), Refusal)
