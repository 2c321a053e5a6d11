"""Launch plans: pure functions from shape, number format and device limits to what is launched.

In which order sums are added follows from the shape alone, never from the device: how a batch is cut into chains, and
so how many partial results there are. The device decides only which variant has room and how many blocks are in flight.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpuback._core.precision import Precision
from gpuback._cuda.coefficients import COEFFICIENTS
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Variant
from gpuback.errors import BackendError, ShapeError

Real = Literal["float", "double"]
"""The C++ name of what sums are kept in."""

VectorEntry = Literal[
    "set_hyper_parameters",
    "mean_of_blocks",
    "scale_weights",
    "unscale",
    "settle_scale",
    "begin_step",
    "vector_norm",
    "sgd",
    "adam",
    "largest",
    "exact_sum",
]
"""The kernels over flat vectors."""

THREADS = 256
"""In a block, but for those on tensor cores."""

SHARED_RESERVED = 1024
"""Bytes of shared memory that the system takes for itself with each block."""

NARROW_WARPS = 16
"""In a block of `layer_mma_narrow`."""

MMA_THREADS = 128
"""In a block of `layer_mma` and `forward_mma`."""

ITEMS_WANTED = 132
"""Items of dW: enough for the largest GPUs. Bits depend on it, so it does not follow the device."""

SIMT_ITEMS_WANTED, SIMT_TILES_WANTED, SIMT_SMALLEST_CHAIN, SIMT_LONGEST_CHAIN = 256, 96, 128, 8192
"""For kernels without tensor cores: items of dW, beside which da's run; large tiles of da or of a forward pass, below
which small ones balance better; rows of a chain. By measurements on an H200 with 132 multiprocessors."""

SMALLEST_CHAIN, LONGEST_CHAIN = 256, 2048
"""Rows of the batch that one partial result adds up. Below the first, partial results are more work than they save.
Above the second, tensor cores, which cut off what does not fit as they add 16 products at a time, lose more than √K
allows."""

NARROW_SMALLEST_CHAIN = 128
"""The same for `layer_mma_narrow`, which otherwise spends more time on partial results than on samples."""

NARROW = 128
"""A layer up to this wide on both sides goes through `layer_mma_narrow`."""


@dataclass(frozen=True)
class Chains:
    """How a sum over the batch is cut: how many partial sums, each over how many rows, added in groups of what size."""

    count: int
    rows: int

    def __str__(self) -> str:
        return f"{self.count} chains of {self.rows} rows"

    @property
    def group_size(self) -> int:
        """⌈√count⌉."""
        return math.isqrt(max(self.count, 1) - 1) + 1

    @property
    def counters(self) -> int:
        """One for each group and one for the groups."""
        return -(-self.count // self.group_size) + 1


def chains_for(batch_size: int, wanted: int, shortest: int, longest: int) -> Chains:
    """About `wanted` chains of whole multiples of 64 rows, within limits."""
    rows = min(max(-(-batch_size // wanted), shortest), longest)
    rows = -(-rows // 64) * 64
    return Chains(-(-batch_size // rows), rows)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer's backward pass is launched.

    Attributes:
        launch: what is launched.
        chains: how the sum over the batch is cut.
        partials: numbers of workspace for partial results.
        counters: how many arrival counters, all 0 before and after.
        draws: whether blocks draw items of work, and the kernel takes a counter for that.
        why: in words, for `explain`.
    """

    launch: LaunchPlan
    chains: Chains
    partials: int
    counters: int
    draws: bool
    why: str


def _operand(precision: Precision) -> str:
    """The C++ name of what products read."""
    return precision.name if precision.sixteen_bit else _real(precision)


def _real(precision: Precision) -> Real:
    """The C++ name of what sums are kept in."""
    return real_of(precision.accumulator)


def real_of(dtype: np.dtype[Any]) -> Real:
    """The C++ name of float32 or float64."""
    return "double" if dtype == np.float64 else "float"


def uses_tensor_cores(precision: Precision) -> bool:
    """Whether products of this precision run on tensor cores."""
    return precision.sixteen_bit or precision.tf32


# Tiles, as in kernels/simt_tile.cuh and kernels/mma_tile.cuh


def simt_shared(real: str, tile: int) -> int:
    """Bytes of shared memory of a tile without tensor cores."""
    return (8 if real == "double" else 4) * (tile * tile + 2 * 16 * 2 * (tile + 4))


def mma_shared(operand: str, tile: int) -> int:
    """Bytes of shared memory of a tile on tensor cores."""
    size = 4 if operand == "float" else 2
    step = 64 // size
    upright, flat = tile * (step + 8), step * (tile + 8)
    return 128 + max(size * 4 * max(upright + flat, 2 * upright, 2 * flat), 4 * tile * (tile + 8))


@dataclass(frozen=True)
class _Slabs:
    """A variant of `layer_mma_narrow`: how many rows of the batch are in a slab, and how many slabs in the ring."""

    max_out: int
    max_in: int
    rows: int
    count: int

    def shared_bytes(self, operand: str) -> int:
        size, pad_w = (4, 4) if operand == "float" else (2, 8)
        share = max(self.max_in // (NARROW_WARPS // (self.rows // 16)), 16)
        staged = NARROW_WARPS * 16 * (min(share, 32) + 8) * 4
        w = self.max_out * (self.max_in + pad_w)
        return size * (w + self.count * self.rows * (self.max_out + self.max_in + 16)) + staged

    def variant(self, operand: str) -> Variant:
        defines = ("MAX_OUT", self.max_out), ("MAX_IN", self.max_in), ("SLAB_ROWS", self.rows), ("SLABS", self.count)
        return Variant(
            "layer_mma_narrow.cu",
            "layer_mma_narrow",
            (f"OPERAND={operand}", *(f"{name}={value}" for name, value in defines)),
        )


def slab_choices(operand: str, max_out: int, max_in: int) -> list[_Slabs]:
    """From deep to shallow: the first that has room in shared memory is taken."""
    size = 4 if operand == "float" else 2
    if max_out == max_in == 64:
        return [_Slabs(64, 64, 256 // size, 3), _Slabs(64, 64, 128 // size, 3)]
    return [_Slabs(max_out, max_in, 128 // size, 3), _Slabs(128, 128, 32, 2)]


def _require_tensor_cores(precision: Precision, limits: DeviceLimits) -> None:
    if not limits.tensor_cores:
        major, minor = limits.capability
        what = "allow_tf32=True" if precision.tf32 else f"dtype {precision.name!r}"
        raise BackendError(
            f"{what} needs tensor cores of compute capability 8.0 or later, and this device has {major}.{minor}. "
            f"Remedy: dtype='float32' without allow_tf32, or backend='numpy'"
        )


@functools.cache
def layer_plan(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits, *, need_da_prev: bool = True
) -> LayerPlan:
    """How to run a layer's backward pass: dW, db and, if needed, da of the layer below.

    Raises:
        BackendError: the device cannot run such products.
    """
    if not uses_tensor_cores(precision):
        return _simt_layer(batch_size, n_out, n_in, precision, limits, need_da_prev)
    _require_tensor_cores(precision, limits)
    if max(n_out, n_in) <= NARROW:
        plan = _narrow_layer(batch_size, n_out, n_in, precision, limits)
        if plan is not None:
            return plan
    return _mma_layer(batch_size, n_out, n_in, precision, limits, need_da_prev)


@functools.cache
def delta_plan(batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits) -> LayerPlan:
    """How to run da of the layer below by itself: a layer's backward pass without a chain of dW, tile by tile.

    Raises:
        BackendError: the device cannot run such products.
    """
    if not uses_tensor_cores(precision):
        whole = _simt_layer(batch_size, n_out, n_in, precision, limits, need_da_prev=True)
        tile = _simt_tile(_real(precision), min(n_out, n_in), batch_size, n_in)
    else:
        _require_tensor_cores(precision, limits)
        whole = _mma_layer(batch_size, n_out, n_in, precision, limits, need_da_prev=True)
        tile = int(whole.launch.variant.defines[-1].partition("=")[2])
    items = -(-batch_size // tile) * -(-n_in // tile)
    return LayerPlan(
        whole.launch._replace(grid=min(items, whole.launch.grid)),
        Chains(0, whole.chains.rows),
        partials=0,
        counters=0,
        draws=whole.draws,
        why=f"one launch: {items} tiles of {tile} x {tile} of da",
    )


def narrow_chains(batch_size: int) -> Chains:
    """How a narrow layer's sums over the batch are cut."""
    return chains_for(batch_size, ITEMS_WANTED, NARROW_SMALLEST_CHAIN, LONGEST_CHAIN)


def whole_packs(count: int) -> int:
    """So many float32, by fours: what a lane moves at a time."""
    return -(-count // 4) * 4


def _held(of_dw: int, fragments: int) -> int:
    """Numbers that a lane brings to a reduction: its part of dW, and two of db for each row of fragments."""
    return of_dw + whole_packs(2 * fragments)


def _narrow_layer(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits
) -> LayerPlan | None:
    """One block to a chain; None where shared memory has no room for it."""
    operand = _operand(precision)
    max_out, max_in = (64 if width <= 64 else 128 for width in (n_out, n_in))
    choices = slab_choices(operand, max_out, max_in)
    slabs = next((s for s in choices if s.shared_bytes(operand) <= limits.shared_bytes), None)
    if slabs is None:
        return None
    chains = narrow_chains(batch_size)
    per_lane = _held(slabs.max_out * slabs.max_in // (32 * NARROW_WARPS), slabs.max_out // 64)
    return LayerPlan(
        LaunchPlan(slabs.variant(operand), chains.count, 32 * NARROW_WARPS, slabs.shared_bytes(operand)),
        chains,
        partials=chains.count * NARROW_WARPS * 32 * per_lane,
        counters=NARROW_WARPS * chains.counters,
        draws=False,
        why=f"one launch on tensor cores: each of {chains.count} blocks reads its rows once for dW, db and da",
    )


def _mma_layer(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits, need_da_prev: bool
) -> LayerPlan:
    operand = _operand(precision)
    for tile in (128, 64):
        tiles_o, tiles_i = -(-n_out // tile), -(-n_in // tile)
        if max(n_out, n_in) <= NARROW:  # where only the device keeps a layer from `layer_mma_narrow`: the same bits
            chains = narrow_chains(batch_size)
        else:
            chains = chains_for(batch_size, max(1, ITEMS_WANTED // (tiles_o * tiles_i)), SMALLEST_CHAIN, LONGEST_CHAIN)
        dw_items, da_items = chains.count * tiles_o * tiles_i, -(-batch_size // tile) * tiles_i
        if dw_items + da_items >= ITEMS_WANTED:  # with da in any case: dW has the same bits without
            break
    items = dw_items + need_da_prev * da_items
    per_lane = _held(tile * tile // MMA_THREADS, tile // 32)
    variant = Variant("layer_mma.cu", "layer_mma", (f"OPERAND={operand}", f"TILE={tile}"))
    shared = mma_shared(operand, tile)
    room = (limits.shared_bytes + SHARED_RESERVED) // (shared + SHARED_RESERVED)
    in_flight = limits.multiprocessors * max(1, min(2 if tile == 128 else 3, room))
    return LayerPlan(
        LaunchPlan(variant, min(items, in_flight), MMA_THREADS, shared),
        chains,
        partials=chains.count * tiles_o * tiles_i * MMA_THREADS * per_lane,
        counters=MMA_THREADS // 32 * tiles_o * tiles_i * chains.counters,
        draws=True,
        why=f"one launch on tensor cores: {items} tiles of {tile} x {tile} of dW ({chains.count} chains) and da",
    )


def _simt_layer(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits, need_da_prev: bool
) -> LayerPlan:
    real = _real(precision)
    tile = _simt_tile(real, min(n_out, n_in), batch_size, n_in)
    tiles_o, tiles_i, tiles_da = -(-n_out // tile), -(-n_in // tile), -(-batch_size // tile) * -(-n_in // tile)
    # No shorter than an item of da, which nothing can cut: that would only add partial results.
    shortest = max(SIMT_SMALLEST_CHAIN, n_out)
    chains = chains_for(batch_size, -(-SIMT_ITEMS_WANTED // (tiles_o * tiles_i)), shortest, SIMT_LONGEST_CHAIN)
    items = chains.count * tiles_o * tiles_i + need_da_prev * tiles_da
    partials = tile * tile + THREADS * (2 if real == "double" else 4)
    return LayerPlan(
        LaunchPlan(simt_variant("layer_simt", real, tile), items, THREADS, simt_shared(real, tile)),
        chains,
        partials=chains.count * tiles_o * tiles_i * partials if chains.count > 1 else 0,
        counters=8 * tiles_o * tiles_i * chains.counters,
        draws=False,
        why=f"one launch: {items} tiles of {tile} x {tile} of dW ({chains.count} chains) and da",
    )


def simt_tiles(real: str) -> tuple[int, ...]:
    """The tiles that there are without tensor cores."""
    return (64,) if real == "double" else (128, 64)


def _simt_tile(real: str, narrowest: int, rows: int, columns: int) -> int:
    """For so many rows and columns of da or of a forward pass."""
    enough = -(-rows // 128) * -(-columns // 128) >= SIMT_TILES_WANTED
    return 128 if narrowest > 64 and enough and 128 in simt_tiles(real) else 64


def simt_variant(entry: str, real: str, tile: int) -> Variant:
    """A kernel without tensor cores."""
    return Variant("layer_simt.cu", entry, (f"REAL={real}", f"TILE={tile}"))


@functools.cache
def forward_plan(batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits) -> LaunchPlan:
    """How to run a layer's forward pass: one block to a tile of the output.

    Raises:
        BackendError: the device cannot run such products.
    """
    if uses_tensor_cores(precision):
        _require_tensor_cores(precision, limits)
        operand = _operand(precision)
        wide = -(-batch_size // 128) * -(-n_out // 128) >= ITEMS_WANTED and n_out > 64
        rows = columns = 128 if wide else 64
        variant = Variant("layer_mma.cu", "forward_mma", (f"OPERAND={operand}", f"TILE={rows}"))
        shared, threads = mma_shared(operand, rows), MMA_THREADS
    else:
        real = _real(precision)
        rows = columns = _simt_tile(real, n_out, batch_size, n_out)
        variant = simt_variant("forward_simt", real, rows)
        shared, threads = simt_shared(real, rows), THREADS
    return LaunchPlan(variant, -(-batch_size // rows) * -(-n_out // columns), threads, shared)


# Rows and elements

LARGEST_ROW_GRID = 1024
"""Blocks of kernels that go over rows or elements. Sums over the batch depend on it."""

LONGEST_EXACT_SUM = 2**31
"""Terms of which limbs of 21 bits still add up exactly in float64."""


def _row_blocks(rows: int) -> int:
    """Eight rows to a block at a time."""
    return min(-(-rows // 8), LARGEST_ROW_GRID)


def loss_plan(batch_size: int, precision: Precision) -> LaunchPlan:
    """The output layer: each row's loss and da, and the mean loss."""
    variant = Variant("losses.cu", "loss_rows", (f"REAL={_real(precision)}", f"OPERAND={_operand(precision)}"))
    return LaunchPlan(variant, _row_blocks(batch_size), THREADS, 8 * 8)


def output_plan(batch_size: int, precision: Precision) -> LaunchPlan:
    """The network's output ŷ from its pre-activations."""
    variant = Variant("losses.cu", "output_rows", (f"REAL={_real(precision)}", f"OPERAND={_operand(precision)}"))
    return LaunchPlan(variant, _row_blocks(batch_size), THREADS)


def copy_plan(entry: Literal["copy_rows", "copy_weights"], rows: int, precision: Precision) -> LaunchPlan:
    """Copies in the operands' format."""
    variant = Variant("losses.cu", entry, (f"REAL={_real(precision)}", f"OPERAND={_operand(precision)}"))
    return LaunchPlan(variant, _row_blocks(rows), THREADS)


PerSampleEntry = Literal["add_norms", "clip_rows", "outer_rows"]
"""The kernels over each sample by itself."""


def per_sample_plan(entry: PerSampleEntry, rows: int, precision: Precision) -> LaunchPlan:
    """A warp to each of so many rows: samples, or samples' units."""
    variant = Variant("losses.cu", entry, (f"REAL={_real(precision)}", f"OPERAND={_operand(precision)}"))
    return LaunchPlan(variant, _row_blocks(rows), THREADS)


def vector_plan(entry: VectorEntry, length: int, real: Real) -> LaunchPlan:
    """Kernels over flat vectors: four numbers a thread at a time.

    Raises:
        ShapeError: more terms than add up exactly.
    """
    exact, adds_up = entry in ("largest", "exact_sum"), entry in ("begin_step", "vector_norm", "largest", "exact_sum")
    if exact and length > LONGEST_EXACT_SUM:
        raise ShapeError(f"an exact sum: expected at most {LONGEST_EXACT_SUM} terms, got {length}")
    blocks = min(-(-length // (4 * THREADS)), 256 if adds_up else LARGEST_ROW_GRID)
    source = "exact_sums.cu" if exact else "optimizers.cu"
    return LaunchPlan(Variant(source, entry, (f"REAL={real}",)), blocks, THREADS, 3 * 8 * 8 if adds_up else 0)


# Exact products and losses

ExactEntry = Literal[
    "largest_of_rows",
    "largest_of_columns",
    "split",
    "accumulate",
    "add_block",
    "finish_forward",
    "finish_delta",
    "finish_gradient",
]
"""The kernels over the operands and the sums of exact products."""

COLUMNS_OF_A_WARP, ROWS_OF_A_BLOCK = 256, 64
"""Columns of a row that a warp takes at a time; the fewest rows in which a block looks for the largest of a column."""


def exact_plan(entry: ExactEntry, rows: int, columns: int, precision: Precision) -> LaunchPlan:
    """A kernel over a matrix of so many rows and columns, a warp to a piece of a row. No grid changes a bit."""
    operand = f"OPERAND={_operand(precision)}"
    if entry in ("largest_of_rows", "largest_of_columns", "split"):
        variant = Variant("split.cu", entry, (operand,))
    else:
        variant = Variant("combine.cu", entry, (operand, *COEFFICIENTS))
    if entry == "largest_of_rows":
        blocks = _row_blocks(rows)
    elif entry == "largest_of_columns":
        groups = -(-columns // 32)
        blocks = groups * max(1, min(-(-rows // ROWS_OF_A_BLOCK), LARGEST_ROW_GRID // groups))
    else:
        blocks = _row_blocks(rows * -(-columns // COLUMNS_OF_A_WARP))
    return LaunchPlan(variant, blocks, THREADS)


def exact_row_plan(
    entry: Literal["exact_loss_rows", "exact_output_rows"], rows: int, precision: Precision
) -> LaunchPlan:
    """The output layer: each row's loss and da, or ŷ."""
    variant = Variant("exact_losses.cu", entry, (f"OPERAND={_operand(precision)}", *COEFFICIENTS))
    return LaunchPlan(variant, _row_blocks(rows), THREADS)
