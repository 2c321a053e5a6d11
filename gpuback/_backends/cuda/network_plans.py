"""Launch plans of the kernels that take a whole narrow network at once: those of kernels/network.

The split of the batch follows from the shape alone: in one launch, and in two, sums have the same bits on every device.
The device's shared memory decides which of the two it is, or whether a network goes layer by layer, and how many rows a
batch tile has, which changes no bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.cuda import split_k
from gpuback._backends.cuda.arguments import MOST_COMPILED_IN, cases_of
from gpuback._backends.cuda.formats import uses_tensor_cores
from gpuback._backends.cuda.layer_plans import NARROW
from gpuback._backends.cuda.network_layout import (
    CIRCULAR_BUFFER_BYTES,
    padding,
    passes_layout,
    slab_bytes,
    slab_layout,
    step_layout,
    table_bytes,
)
from gpuback._backends.cuda.split_k import SplitK
from gpuback._core.architecture import Architecture
from gpuback._core.integers import ceil_div, round_up
from gpuback._core.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from gpuback._core.precision import Precision
from gpuback._cuda.hopper import SWITCH
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Variant

TWO_LAUNCH_WARPS = 8
"""In a block of the kernels in fused_passes.cu."""

FLOAT32_NARROW = 32
"""Up to this width networks of float32 operands are faster as a whole than layer by layer, whatever their tiles."""

COUNTERS = 4
"""Of a launch, before the fragments' own."""

TILES_B = (128, 96, 64, 32)
"""Rows of a batch tile of 8 warps, the best first: with 128 each of a block's warps has 16 of its own."""

WGMMA_THREADS = 512
"""In a block of `fused_step_wgmma`."""

WIDE_TILES_B = (256, *TILES_B)
"""Rows of a batch tile of 16 warps."""

TwoLaunchEntry = Literal["fused_passes", "fused_weight_gradients_64", "fused_weight_gradients_128"]
"""The kernels of the two launches."""


class Shape(NamedTuple):
    """The widest layers and the most of them whose sums of dW a variant of `fused_step` holds in registers."""

    width: int
    layers: int


SHAPES = (Shape(32, 14), Shape(64, 7), Shape(128, 2))
"""The variants there are, the better first."""

WGMMA_SHAPES = SHAPES[:2]
"""Those of `fused_step_wgmma`."""

SLAB = 128
"""Rows of a batch tile of `fused_step_wgmma`."""

DB_APART = False
"""Whether `fused_step_wgmma` makes db by products of its own: for a device that takes no columns of an operand from
another panel. The bits are the same."""

PIECE = 3 * 32 * 4
"""Numbers of a fragment of `fused_step_wgmma`: `Piece` in kernels/network/fused_step_wgmma.cu."""


IN_ONE_LAUNCH = (CrossEntropy(), BinaryCrossEntropy(), SquaredError())
"""The losses of `fused_step`."""


@dataclass(frozen=True)
class Refusal:
    """The reason why there is no such plan, in words for `explain`."""

    reason: str


@dataclass(frozen=True)
class SumsPlan:
    """The split and the reduction of sums over the batch.

    Attributes:
        split: how the batch is cut.
        partials: numbers of workspace for partial sums.
        slots: the fragments of dW that warps could hold, for all layers.
        fragments: how many of them lie inside a layer.
    """

    split: SplitK
    partials: int
    slots: int
    fragments: int

    @property
    def counters(self) -> int:
        """All 0 before and after."""
        return COUNTERS + self.slots * self.split.counters


@dataclass(frozen=True)
class StepPlan:
    """A step of a whole network in one launch.

    Attributes:
        launch: what is launched.
        layout: what lies where: (L + 1,) of `network_layout.LAYER`.
        tile_b: rows of a batch tile.
        sums: those of dW and db.
        remark: what `explain` says of the kernel, if anything.
    """

    launch: LaunchPlan
    layout: NDArray[np.void]
    tile_b: int
    sums: SumsPlan
    remark: str = ""

    @property
    def in_words(self) -> list[str]:
        """The launch, for `explain`."""
        launch = self.launch
        return [
            f"{launch.variant.entry}, {launch.grid} blocks, batch tiles of {self.tile_b} rows, {self.sums.split}"
            + self.remark,
        ]


@dataclass(frozen=True)
class PassesPlan:
    """A network's forward pass, its loss and its backward pass down to every da in one launch.

    Attributes:
        launch, layout, tile_b: as StepPlan's.
        all_weights: a block keeps all of them; else it reads each layer's anew for every batch tile.
        split: how the batch is cut.
        columns: of all matrices of the workspace.
    """

    launch: LaunchPlan
    layout: NDArray[np.void]
    tile_b: int
    all_weights: bool
    split: SplitK
    columns: int


@dataclass(frozen=True)
class WeightGradientsPlan:
    """All dW and db from what a PassesPlan has left in the workspace, in one launch."""

    launch: LaunchPlan
    tile_b: int
    sums: SumsPlan


class TwoLaunches(NamedTuple):
    """The plans of a step in two launches."""

    passes: PassesPlan
    weight_gradients: WeightGradientsPlan

    @property
    def in_words(self) -> list[str]:
        """The launches, for `explain`."""
        first, second = self.passes.launch, self.weight_gradients.launch
        kept = "all weights" if self.passes.all_weights else "one layer's weights"
        return [
            f"{first.variant.entry}, {first.grid} blocks, batch tiles of {self.passes.tile_b} rows beside {kept}, "
            f"{self.passes.split}",
            f"{second.variant.entry}, {second.grid} blocks, for each layer {self.weight_gradients.sums.split}",
        ]


def fused_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> StepPlan | TwoLaunches | Refusal:
    """Plan a narrow network's step, or say why it goes layer by layer."""
    plan = possible_fused_plan(architecture, batch_size, limits)
    if isinstance(plan, Refusal):
        return plan
    return why_slower(architecture, plan.tile_b if isinstance(plan, StepPlan) else None) or plan


def possible_fused_plan(
    architecture: Architecture, batch_size: int, limits: DeviceLimits
) -> StepPlan | TwoLaunches | Refusal:
    """Plan a narrow network's step, whether or not that is the fastest way."""
    unsupported = why_unsupported(architecture, limits)
    if unsupported is not None:
        return unsupported
    step = step_plan(architecture, batch_size, limits)
    if isinstance(step, StepPlan):
        return step
    passes = passes_plan(architecture, batch_size, limits, backward=True)
    if isinstance(passes, Refusal):
        return passes
    weight_gradients = weight_gradients_plan(architecture, batch_size, limits)
    if isinstance(weight_gradients, Refusal):
        return weight_gradients
    return TwoLaunches(passes, weight_gradients)


def why_unsupported(architecture: Architecture, limits: DeviceLimits) -> Refusal | None:
    """Say why no kernel takes such a network at once; None if there is one."""
    precision, widest = architecture.precision, max(architecture.sizes)
    if architecture.loss_row.kernel_id is None:
        return Refusal("its loss is a function, and goes layer by layer")
    if uses_tensor_cores(precision) and not limits.tensor_cores:
        return Refusal("this device has no tensor cores for such operands")
    if precision.reproducible:
        return Refusal("reproducible mode goes layer by layer")
    if precision.name == "float64":
        return Refusal("float64 goes layer by layer")
    lacking = len({g.name for g in architecture.hidden_activations if g.kernel_id is None})
    if lacking > MOST_COMPILED_IN:
        return Refusal(
            f"kernels lack {lacking} of its activations, and a launch takes up to {MOST_COMPILED_IN} of these"
        )
    if widest > NARROW:
        return Refusal(f"a layer is {widest} wide, and whole networks are taken up to {NARROW}")
    return None


def why_slower(architecture: Architecture, tile_b: int | None) -> Refusal | None:
    """Say why a network that could be taken at once is faster layer by layer; None if it is not.

    Args:
        tile_b: rows of a batch tile of its step in one launch, if there is one.
    """
    widest = max(architecture.sizes)
    if architecture.precision.sixteen_bit or widest <= FLOAT32_NARROW or tile_b == TILES_B[0]:
        return None
    return Refusal(
        f"float32 layers of {widest} are faster one by one than a network of them, which has no room for batch tiles "
        f"of {TILES_B[0]} rows"
    )


@functools.cache
def step_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> StepPlan | Refusal:
    """Plan a step in one launch, or say why there is none. For networks that `why_unsupported` lets through."""
    sizes, precision = architecture.sizes, architecture.precision
    depth, widest = len(sizes) - 1, max(sizes)
    shape = next((shape for shape in SHAPES if widest <= shape.width and depth <= shape.layers), None)
    if shape is None:
        known = " or ".join(f"{shape.layers} of {shape.width}" for shape in SHAPES)
        return Refusal(f"registers hold the sums of {known} layers, not of {depth} up to {widest} wide")
    if architecture.loss_row not in IN_ONE_LAUNCH:
        return Refusal(f"beside the sums of all gradients, registers have no room for {architecture.loss_row!r}")
    remark = ""
    if limits.wgmma and precision.sixteen_bit:
        by_wgmma = _wgmma_step_plan(architecture, batch_size, shape, limits)
        if isinstance(by_wgmma, StepPlan):
            return by_wgmma
        remark = f" ({by_wgmma.reason})"
    warps = step_warps(precision)
    for tile_b in TILES_B if warps == 8 else WIDE_TILES_B:
        layout, shared_bytes = step_layout(architecture, tile_b)
        if shared_bytes <= limits.shared_bytes:
            break
    else:
        return _no_room(shared_bytes, limits)
    sums = _sums(sizes, shape.width, warps, split_k.narrow_split(batch_size))
    launch = LaunchPlan(step_variant(shape, precision), sums.split.splits, 32 * warps, shared_bytes)
    return StepPlan(cases_of(architecture.hidden_activations).added_to(launch), layout, tile_b, sums, remark)


def _wgmma_step_plan(
    architecture: Architecture, batch_size: int, shape: Shape, limits: DeviceLimits
) -> StepPlan | Refusal:
    """Plan a step by wgmma, or say why `fused_step` makes it."""
    if shape not in WGMMA_SHAPES:
        return Refusal(f"by wgmma layers go up to {WGMMA_SHAPES[-1].width} wide")
    shared_bytes = slab_bytes(*shape)
    if shared_bytes > limits.shared_bytes:
        return _no_room(shared_bytes, limits)
    split, pairs = split_k.narrow_split(batch_size), list(pairwise(architecture.sizes))
    slots = len(pairs) * wgmma_pieces(shape.width, shape.width)
    pieces = sum(wgmma_pieces(n_in, n_out) for n_in, n_out in pairs)
    sums = SumsPlan(split, split.splits * slots * PIECE, slots, pieces)
    launch = LaunchPlan(wgmma_step_variant(shape, architecture.precision), split.splits, WGMMA_THREADS, shared_bytes)
    launch = cases_of(architecture.hidden_activations).added_to(launch)
    return StepPlan(launch, slab_layout(architecture), SLAB, sums, f", by wgmma ({SWITCH})")


def wgmma_pieces(n_in: int, n_out: int) -> int:
    """Count the pieces of a layer's dW: 16 rows, and of a lane's packs, one of db and one for 8 inputs, 3."""
    return ceil_div(n_out, 16) * ceil_div(1 + ceil_div(n_in, 8), 3)


@functools.cache
def passes_plan(
    architecture: Architecture, batch_size: int, limits: DeviceLimits, *, backward: bool
) -> PassesPlan | Refusal:
    """Plan the passes in one launch, with or without the backward one, or say why there is none."""
    for all_weights, tile_b in ((True, 128), (True, 96), (True, 64), *((False, tile_b) for tile_b in TILES_B)):
        layout, shared_bytes, columns = passes_layout(architecture, tile_b, all_weights, backward)
        if shared_bytes <= limits.shared_bytes:
            break
    else:
        return _no_room(shared_bytes, limits)
    split = split_k.narrow_split(batch_size)
    grid = min(split.splits, 2 * limits.multiprocessors)
    variant = two_launch_variant("fused_passes", architecture.precision)
    launch = LaunchPlan(variant, grid, 32 * TWO_LAUNCH_WARPS, shared_bytes)
    launch = cases_of(architecture.hidden_activations).added_to(launch)
    return PassesPlan(launch, layout, tile_b, all_weights, split, columns)


@functools.cache
def weight_gradients_plan(
    architecture: Architecture, batch_size: int, limits: DeviceLimits
) -> WeightGradientsPlan | Refusal:
    """Plan all layers' dW and db in one launch, or say why there is none."""
    sizes, precision = architecture.sizes, architecture.precision
    depth, width = len(sizes) - 1, 64 if max(sizes) <= 64 else 128
    pitch = (width + padding(precision)) * precision.operand.itemsize
    before = table_bytes(depth) + 4 * 4 * width  # sums of db, of four warps
    for tile_b in TILES_B[0], TILES_B[2], TILES_B[3]:
        shared_bytes = before + max(4 * tile_b * pitch, CIRCULAR_BUFFER_BYTES)
        if shared_bytes <= limits.shared_bytes // (1 if tile_b == TILES_B[-1] else 2):
            break
    else:
        return _no_room(shared_bytes, limits)
    wanted = ceil_div(2 * split_k.WORK_TILES_WANTED, depth)
    split = split_k.split_batch(batch_size, wanted, split_k.NARROW_SMALLEST_SPLIT, split_k.LARGEST_SPLIT)
    sums = _sums(sizes, width, TWO_LAUNCH_WARPS, split)
    grid = min(depth * split.splits, 2 * limits.multiprocessors)
    variant = two_launch_variant(
        "fused_weight_gradients_64" if width == 64 else "fused_weight_gradients_128", precision
    )
    return WeightGradientsPlan(LaunchPlan(variant, grid, 32 * TWO_LAUNCH_WARPS, shared_bytes), tile_b, sums)


def _no_room(shared_bytes: int, limits: DeviceLimits) -> Refusal:
    return Refusal(f"a block would need {shared_bytes:,} bytes of shared memory of {limits.shared_bytes:,}")


def _sums(sizes: tuple[int, ...], width: int, warps: int, split: SplitK) -> SumsPlan:
    """Cover each dW with the warps, four of them across; each holds a fragment of `rows` x `columns`."""
    rows, columns = max(width // (warps // 4), 16), width // 4
    per_lane = rows * columns // 32 + round_up(ceil_div(rows, 32), 4)
    slots = warps * (len(sizes) - 1)
    fragments = sum(ceil_div(n_out, rows) * ceil_div(n_in, columns) for n_in, n_out in pairwise(sizes))
    return SumsPlan(split, split.splits * slots * 32 * per_lane, slots, fragments)


# Variants


def _variant(source: str, entry: str, precision: Precision, *sizes: str) -> Variant:
    operand = precision.name if precision.sixteen_bit else "float"
    tensor_cores = uses_tensor_cores(precision)
    defines = f"Element={operand}", f"TENSOR_CORES={int(tensor_cores)}", *sizes
    return Variant(source, entry, defines, tensor_cores)


def step_warps(precision: Precision) -> int:
    """Count the warps of a block of `fused_step`. 16 hide latencies better, where registers suffice."""
    return 16 if precision.sixteen_bit else 8


def step_variant(shape: Shape, precision: Precision) -> Variant:
    """Name the kernel of the one launch."""
    sizes = f"MAX_WIDTH={shape.width}", f"MAX_LAYERS={shape.layers}", f"WARPS={step_warps(precision)}"
    return _variant("network/fused_step.cu", "fused_step", precision, *sizes)


def wgmma_step_variant(shape: Shape, precision: Precision) -> Variant:
    """Name the kernel of the one launch by wgmma."""
    sizes = f"MAX_WIDTH={shape.width}", f"MAX_LAYERS={shape.layers}"
    defines = f"Element={precision.name}", *sizes, *(("DB_APART=1",) if DB_APART else ())
    return Variant("network/fused_step_wgmma.cu", "fused_step_wgmma", defines, tensor_cores=True, wgmma=True)


def two_launch_variant(entry: TwoLaunchEntry, precision: Precision) -> Variant:
    """Name a kernel of the two launches."""
    source = "network/fused_passes.cu" if entry == "fused_passes" else "network/fused_weight_gradients.cu"
    return _variant(source, entry, precision)
