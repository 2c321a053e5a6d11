"""Launch plans of the kernels that take a whole narrow network at once: those of kernels/network.

How the batch is cut follows from the shape alone: in one launch, and in two, sums have the same bits on every device.
The device decides by its shared memory which of the two it is, or whether a network goes layer by layer, and how many
rows a block takes at a time, which changes no bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.cuda import split_k
from gpuback._backends.cuda.formats import uses_tensor_cores
from gpuback._backends.cuda.layer_plans import NARROW
from gpuback._backends.cuda.split_k import SplitK
from gpuback._core.architecture import Architecture
from gpuback._core.integers import ceil_div, round_up
from gpuback._core.precision import Precision
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Variant

CHAIN_WARPS = 8
"""Of a block of the kernels in fused_passes.cu."""

FLOAT32_NARROW = 32
"""Up to this width networks of float32 operands are faster as a whole than layer by layer, whatever their slabs."""

RING_BYTES = 64 * 512
"""Through which a block's warps read partial results, where the slab was."""

LAYER_NUMBERS = 12
"""Of an entry of the layout: `Layer` in kernels/network/network_memory.cuh."""

LOSS_SUM_BYTES = 32 * 8
"""Of a chain's losses, behind the layout."""

COUNTERS = 4
"""Of a launch, before the pieces' own."""

ROWS = (128, 96, 64, 32)
"""Of a slab of 8 warps, the best first: with 128 each of a block's warps has 16 of its own."""

WIDE_ROWS = (256, *ROWS)
"""Of a slab of 16 warps."""

ChainEntry = Literal["fused_passes", "fused_weight_gradients_64", "fused_weight_gradients_128"]
"""The kernels of the two launches."""


class Shape(NamedTuple):
    """The widest layers and the most of them whose sums of dW a variant of `fused_step` holds in registers."""

    width: int
    layers: int


SHAPES = (Shape(32, 14), Shape(64, 7), Shape(128, 2))
"""The variants there are, the better first."""


@dataclass(frozen=True)
class SumsPlan:
    """How sums over the batch are cut and added up.

    Attributes:
        split: how the batch is cut.
        partials: numbers of workspace for partial results.
        slots: a layer's parts that warps could hold, for all layers; `pieces` of them have anything in them.
    """

    split: SplitK
    partials: int
    slots: int
    pieces: int

    @property
    def counters(self) -> int:
        """All 0 before and after."""
        return COUNTERS + self.slots * self.split.counters


@dataclass(frozen=True)
class StepPlan:
    """A step of a whole network in one launch.

    Attributes:
        launch: what is launched.
        layout: what lies where: (L + 1, LAYER_NUMBERS).
        rows: of a slab.
        sums: those of dW and db.
    """

    launch: LaunchPlan
    layout: NDArray[np.int32]
    rows: int
    sums: SumsPlan


@dataclass(frozen=True)
class ChainPlan:
    """A network's forward pass, its loss and its backward pass down to every da in one launch.

    Attributes:
        launch, layout, rows: as StepPlan's.
        all_weights: a block keeps all of them; else it reads each layer's anew for every slab.
        split: how the batch is cut.
        columns: of all matrices of the workspace.
    """

    launch: LaunchPlan
    layout: NDArray[np.int32]
    rows: int
    all_weights: bool
    split: SplitK
    columns: int


@dataclass(frozen=True)
class WeightsPlan:
    """All dW and db from what a ChainPlan has left in the workspace, in one launch."""

    launch: LaunchPlan
    rows: int
    sums: SumsPlan


def whole(width: int) -> int:
    """What a width is rounded up to."""
    return round_up(width, 16)


def refusal(architecture: Architecture, limits: DeviceLimits) -> str | None:
    """Why no kernel takes such a network at once; None if there is one."""
    precision, widest = architecture.precision, max(architecture.sizes)
    if uses_tensor_cores(precision) and not limits.tensor_cores:
        return "this device has no tensor cores for such operands"
    if precision.reproducible:
        return "reproducible mode goes layer by layer"
    if precision.name == "float64":
        return "float64 goes layer by layer"
    if widest > NARROW:
        return f"a layer is {widest} wide, and whole networks are taken up to {NARROW}"
    return None


def drawback(architecture: Architecture, rows: int | None) -> str | None:
    """Why a network that could be taken at once is faster layer by layer; None if it is not.

    Args:
        rows: of a slab of its step in one launch, if there is one.
    """
    widest = max(architecture.sizes)
    if architecture.precision.sixteen_bit or widest <= FLOAT32_NARROW or rows == ROWS[0]:
        return None
    return (
        f"float32 layers of {widest} are faster one by one than a network of them, which has no room for slabs of "
        f"{ROWS[0]} rows"
    )


@functools.cache
def step_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> StepPlan | str:
    """A whole step in one launch; or, in words, why there is none. For what `refusal` lets through."""
    sizes, precision = architecture.sizes, architecture.precision
    depth, widest = len(sizes) - 1, max(sizes)
    shape = next((shape for shape in SHAPES if widest <= shape.width and depth <= shape.layers), None)
    if shape is None:
        known = " or ".join(f"{shape.layers} of {shape.width}" for shape in SHAPES)
        return f"registers hold the sums of {known} layers, not of {depth} up to {widest} wide"
    warps = step_warps(precision)
    for rows in ROWS if warps == 8 else WIDE_ROWS:
        layout, shared_bytes = _step_layout(architecture, rows)
        if shared_bytes <= limits.shared_bytes:
            break
    else:
        return f"a block would need {shared_bytes:,} bytes of shared memory of {limits.shared_bytes:,}"
    sums = _sums(sizes, shape.width, warps, split_k.narrow_split(batch_size))
    launch = LaunchPlan(step_variant(shape, precision), sums.split.splits, 32 * warps, shared_bytes)
    return StepPlan(launch, layout, rows, sums)


@functools.cache
def chain_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits, *, backward: bool) -> ChainPlan | str:
    """The passes in one launch, with or without the backward one; or, in words, why there is none."""
    for all_weights, rows in ((True, 128), (True, 96), (True, 64), *((False, rows) for rows in ROWS)):
        layout, shared_bytes, columns = _chain_layout(architecture, rows, all_weights, backward)
        if shared_bytes <= limits.shared_bytes:
            break
    else:
        return f"a block would need {shared_bytes:,} bytes of shared memory of {limits.shared_bytes:,}"
    split = split_k.narrow_split(batch_size)
    grid = min(split.splits, 2 * limits.multiprocessors)
    launch = LaunchPlan(chain_variant("fused_passes", architecture.precision), grid, 32 * CHAIN_WARPS, shared_bytes)
    return ChainPlan(launch, layout, rows, all_weights, split, columns)


@functools.cache
def weights_plan(architecture: Architecture, batch_size: int, limits: DeviceLimits) -> WeightsPlan | str:
    """All layers' dW and db in one launch; or, in words, why there is none."""
    sizes, precision = architecture.sizes, architecture.precision
    depth, width = len(sizes) - 1, 64 if max(sizes) <= 64 else 128
    pitch = (width + _pad(precision)) * precision.operand.itemsize
    before = _table_bytes(depth) + 4 * 4 * width  # sums of db, of four warps
    for rows in ROWS[0], ROWS[2], ROWS[3]:
        shared_bytes = before + max(4 * rows * pitch, RING_BYTES)
        if shared_bytes <= limits.shared_bytes // (1 if rows == ROWS[-1] else 2):
            break
    else:
        return f"a block would need {shared_bytes:,} bytes of shared memory of {limits.shared_bytes:,}"
    wanted = ceil_div(2 * split_k.WORK_TILES_WANTED, depth)
    split = split_k.split_batch(batch_size, wanted, split_k.NARROW_SMALLEST_SPLIT, split_k.LARGEST_SPLIT)
    sums = _sums(sizes, width, CHAIN_WARPS, split)
    grid = min(depth * sums.split.splits, 2 * limits.multiprocessors)
    variant = chain_variant("fused_weight_gradients_64" if width == 64 else "fused_weight_gradients_128", precision)
    return WeightsPlan(LaunchPlan(variant, grid, 32 * CHAIN_WARPS, shared_bytes), rows, sums)


# What lies where


def _pad(precision: Precision) -> int:
    """Numbers at the end of a row of operands."""
    return 8 if uses_tensor_cores(precision) else 4


def _table_bytes(depth: int) -> int:
    return round_up((depth + 1) * LAYER_NUMBERS * 4, 16)


def _table(architecture: Architecture) -> NDArray[np.int32]:
    """Widths, activations, places in θ, and rows."""
    sizes, hidden = architecture.sizes, architecture.hidden_activations
    table = np.zeros((len(sizes), LAYER_NUMBERS), np.int32)
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        activation = hidden[k].kernel_id if k < len(hidden) else 0
        table[k, :4] = n_in, n_out, activation, architecture.layout.weight_starts[k]
        table[k, 8] = _row_bytes(n_in, architecture.precision) // architecture.precision.operand.itemsize
    table[-1, 0] = sizes[-1]
    table[-1, 8] = _top_row_bytes(sizes[-1], architecture.precision) // architecture.precision.operand.itemsize
    return table


def _row_bytes(width: int, precision: Precision) -> int:
    return (whole(width) + _pad(precision)) * precision.operand.itemsize


def _top_row_bytes(width: int, precision: Precision) -> int:
    return (whole(width) + (4 if precision.sixteen_bit else _pad(precision))) * 4


def _kept(architecture: Architecture) -> list[bool]:
    """For the inputs of each layer, whether the pre-activations that they came from are kept."""
    return [False, *(g.derivative_from == "a" for g in architecture.hidden_activations)]


def _step_layout(architecture: Architecture, rows: int) -> tuple[NDArray[np.int32], int]:
    """For `fused_step`; and the bytes that it takes in all."""
    sizes, precision = architecture.sizes, architecture.precision
    table, end = _table(architecture), _table_bytes(len(sizes) - 1) + LOSS_SUM_BYTES
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        bias, w = end, end + 4 * whole(n_out)
        table[k, 4:6] = w, bias
        end = w + whole(n_out) * _row_bytes(n_in, precision)
    slab = end
    for k, (width, kept) in enumerate(zip(sizes[:-1], _kept(architecture), strict=True)):
        table[k, 6], end = end, end + rows * _row_bytes(width, precision)
        if kept:
            table[k, 7], end = end, end + rows * _row_bytes(width, precision)
    table[-1, 6], end = end, end + rows * _top_row_bytes(sizes[-1], precision)
    return table, max(end, slab + RING_BYTES)


def _chain_layout(
    architecture: Architecture, rows: int, all_weights: bool, backward: bool
) -> tuple[NDArray[np.int32], int, int]:
    """For `fused_passes`; the bytes that it takes in all, and the columns of the workspace.

    Neighbouring layers' inputs take turns at two places. Without `backward` nothing is kept.
    """
    sizes, precision = architecture.sizes, architecture.precision
    depth, kept = len(sizes) - 1, _kept(architecture) if backward else [False] * (len(sizes) - 1)
    table, start = _table(architecture), _table_bytes(depth) + LOSS_SUM_BYTES
    end = start
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        first = end if all_weights else start
        bias, w = first, first + 4 * whole(n_out)
        table[k, 4:6] = w, bias
        end = max(end, w + whole(n_out) * _row_bytes(n_in, precision))
    for turn in range(min(2, depth)):
        widest = max(sizes[:-1][turn::2])
        table[turn:-1:2, 6], end = end, end + rows * _row_bytes(widest, precision)
        if any(kept[turn::2]):
            for k in range(turn, depth, 2):
                table[k, 7] = end if kept[k] else 0
            end += rows * _row_bytes(widest, precision)
    table[-1, 6], end = end, end + rows * _top_row_bytes(sizes[-1], precision)
    columns = 0
    if backward:
        for k, width in enumerate(sizes):
            for number, there in ((9, k < depth), (10, k < depth and kept[k]), (11, k > 0)):
                if there:
                    table[k, number], columns = columns, columns + whole(width)
    return table, end, columns


def _sums(sizes: tuple[int, ...], width: int, warps: int, split: SplitK) -> SumsPlan:
    """Warps stand over each dW, four across, and hold a part of `rows` x `columns` each."""
    rows, columns = max(width // (warps // 4), 16), width // 4
    held = rows * columns // 32 + round_up(ceil_div(rows, 32), 4)
    slots = warps * (len(sizes) - 1)
    pieces = sum(ceil_div(n_out, rows) * ceil_div(n_in, columns) for n_in, n_out in pairwise(sizes))
    return SumsPlan(split, split.splits * slots * 32 * held, slots, pieces)


# Variants


def _variant(source: str, entry: str, precision: Precision, *sizes: str) -> Variant:
    operand = precision.name if precision.sixteen_bit else "float"
    tensor_cores = uses_tensor_cores(precision)
    defines = f"Element={operand}", f"TENSOR_CORES={int(tensor_cores)}", *sizes
    return Variant(source, entry, defines, tensor_cores)


def step_warps(precision: Precision) -> int:
    """Of a block of `fused_step`: what it has to wait for, 16 hide better, where registers are enough for them."""
    return 16 if precision.sixteen_bit else 8


def step_variant(shape: Shape, precision: Precision) -> Variant:
    """The kernel of the one launch for such networks and operands."""
    sizes = f"MAX_WIDTH={shape.width}", f"MAX_LAYERS={shape.layers}", f"WARPS={step_warps(precision)}"
    return _variant("network/fused_step.cu", "fused_step", precision, *sizes)


def chain_variant(entry: ChainEntry, precision: Precision) -> Variant:
    """A kernel of the two launches for such operands."""
    source = "network/fused_passes.cu" if entry == "fused_passes" else "network/fused_weight_gradients.cu"
    return _variant(source, entry, precision)
