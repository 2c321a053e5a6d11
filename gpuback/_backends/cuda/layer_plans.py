"""Launch plans of a layer's passes: pure functions from shape, number format and device limits to what is launched.

The order in which sums are added follows from the shape alone: how the batch is split (split_k.py), and so how many
partial sums there are. The device decides only which variant has room and how many blocks are in flight. Where its
limits say `wgmma`, some layers take the kernels for Hopper (wgmma_plans.py), which add in an order of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpuback._backends.cuda import split_k, wgmma_plans, wgmma_wide_plans
from gpuback._backends.cuda.formats import accumulator_name, operand_name, uses_tensor_cores
from gpuback._backends.cuda.planned_layers import ForwardPlan, LayerPlan
from gpuback._backends.cuda.split_k import SplitK, narrow_split, split_batch
from gpuback._core.integers import ceil_div, round_up
from gpuback._core.precision import Precision
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Variant
from gpuback.errors import BackendError

SIMT_THREADS = 256
"""In a block of the kernels without tensor cores."""

SHARED_RESERVED = 1024
"""Bytes of shared memory that the system takes for itself with each block."""

NARROW_WARPS = 16
"""In a block of `layer_mma_narrow`."""

MMA_THREADS = 128
"""In a block of `layer_mma` and `forward_mma`."""

SIMT_WORK_TILES_WANTED, SIMT_LARGE_TILES_WANTED, SIMT_SMALLEST_SPLIT, SIMT_LARGEST_SPLIT = 256, 96, 128, 8192
"""For kernels without tensor cores: work tiles of dW, beside which da's run; large tiles of da or of a forward pass,
below which small ones balance better; rows of a split. By measurements on an H200 with 132 multiprocessors."""

NARROW = 128
"""A layer up to this wide on both sides goes through `layer_mma_narrow`."""


# Tiles, as in kernels/tiles/simt_tile.cuh and kernels/tiles/mma_tile.cuh


def simt_shared(accum: str, tile: int) -> int:
    """Count the bytes of shared memory of a tile without tensor cores."""
    return (8 if accum == "double" else 4) * (tile * tile + 2 * 16 * 2 * (tile + 4))


def mma_shared(operand: str, tile: int) -> int:
    """Count the bytes of shared memory of a tile on tensor cores."""
    size = 4 if operand == "float" else 2
    step = 64 // size
    upright, flat = tile * (step + 8), step * (tile + 8)
    return 128 + max(size * 4 * max(upright + flat, 2 * upright, 2 * flat), 4 * tile * (tile + 8))


@dataclass(frozen=True)
class NarrowTile:
    """A variant of `layer_mma_narrow`.

    Attributes:
        max_out, max_in: the widest layer that it takes.
        tile_b: rows of a batch tile.
        stages: batch tiles in the circular buffer.
    """

    max_out: int
    max_in: int
    tile_b: int
    stages: int

    def shared_bytes(self, operand: str) -> int:
        size, pad_w = (4, 4) if operand == "float" else (2, 8)
        warp_columns = max(self.max_in // (NARROW_WARPS // (self.tile_b // 16)), 16)
        staged = NARROW_WARPS * 16 * (min(warp_columns, 32) + 8) * 4
        w = self.max_out * (self.max_in + pad_w)
        return size * (w + self.stages * self.tile_b * (self.max_out + self.max_in + 16)) + staged

    def variant(self, operand: str) -> Variant:
        defines = ("MAX_OUT", self.max_out), ("MAX_IN", self.max_in), ("TILE_B", self.tile_b), ("STAGES", self.stages)
        return Variant(
            "layer/layer_mma_narrow.cu",
            "layer_mma_narrow",
            (f"Element={operand}", *(f"{name}={value}" for name, value in defines)),
            tensor_cores=True,
        )


def narrow_tile_choices(operand: str, max_out: int, max_in: int) -> list[NarrowTile]:
    """List tiles from the largest to the smallest; the first that fits into shared memory is taken."""
    size = 4 if operand == "float" else 2
    if max_out == max_in == 64:
        return [NarrowTile(64, 64, 256 // size, 3), NarrowTile(64, 64, 128 // size, 3)]
    return [NarrowTile(max_out, max_in, 128 // size, 3), NarrowTile(128, 128, 32, 2)]


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
    batch_size: int,
    n_out: int,
    n_in: int,
    precision: Precision,
    limits: DeviceLimits,
    *,
    need_da_prev: bool = True,
    from_a: bool = False,
) -> LayerPlan:
    """Plan a layer's backward pass: dW, db and, if needed, da of the layer below.

    With `from_a` its g' is computed from pre-activations, an array beside h. That changes only what is launched: the
    workspace is the same.

    Raises:
        BackendError: the device cannot run such products.
    """
    if not uses_tensor_cores(precision):
        return _simt_layer(batch_size, n_out, n_in, precision, limits, need_da_prev)
    _require_tensor_cores(precision, limits)
    if _by_wgmma(n_out, precision, limits):
        return wgmma_plans.narrow_layer_plan(
            batch_size, n_out, n_in, precision, need_da_prev=need_da_prev, from_a=from_a
        )
    if _by_wide_wgmma(batch_size, n_out, n_in, precision, limits):
        return wgmma_wide_plans.layer_plan(batch_size, n_out, n_in, precision, limits, need_da_prev=need_da_prev)
    if max(n_out, n_in) <= NARROW:
        plan = _narrow_layer(batch_size, n_out, n_in, precision, limits)
        if plan is not None:
            return plan
    return _mma_layer(batch_size, n_out, n_in, precision, limits, need_da_prev)


def _by_wgmma(n_out: int, precision: Precision, limits: DeviceLimits) -> bool:
    """Say whether a layer's backward pass takes Hopper's kernel for narrow layers."""
    return limits.wgmma and precision.sixteen_bit and n_out <= wgmma_plans.WIDEST


def _by_wide_wgmma(batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits) -> bool:
    """Say whether the backward pass of a layer that is not narrow takes Hopper's kernel for wide ones."""
    return limits.wgmma and precision.sixteen_bit and wgmma_wide_plans.takes_layer(batch_size, n_out, n_in)


@functools.cache
def delta_plan(batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits) -> LayerPlan:
    """Plan da of the layer below by itself: a layer's backward pass without dW.

    Raises:
        BackendError: the device cannot run such products.
    """
    if _by_wgmma(n_out, precision, limits):
        return wgmma_plans.narrow_delta_plan(batch_size, n_out, n_in, precision)
    if _by_wide_wgmma(batch_size, n_out, n_in, precision, limits):
        return wgmma_wide_plans.delta_plan(batch_size, n_out, n_in, precision, limits)
    if not uses_tensor_cores(precision):
        whole = _simt_layer(batch_size, n_out, n_in, precision, limits, need_da_prev=True)
        tile = _simt_tile(accumulator_name(precision), min(n_out, n_in), batch_size, n_in)
    else:
        _require_tensor_cores(precision, limits)
        whole = _mma_layer(batch_size, n_out, n_in, precision, limits, need_da_prev=True)
        tile, _ = _mma_tile(batch_size, n_out, n_in)
    work_tiles = ceil_div(batch_size, tile) * ceil_div(n_in, tile)
    return LayerPlan(
        whole.launch._replace(grid=min(work_tiles, whole.launch.grid)),
        SplitK(0, whole.split.rows_per_split),
        partials=0,
        counters=0,
        persistent=whole.persistent,
        why=f"one launch: {work_tiles} tiles of {tile} x {tile} of da",
    )


def _per_lane(of_dw: int, fragments: int) -> int:
    """Count the numbers that a lane brings to a reduction: its part of dW, and two of db for each row of fragments."""
    return of_dw + round_up(2 * fragments, 4)


def _narrow_layer(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits
) -> LayerPlan | None:
    """Plan a block for each split; None where shared memory has no room for it."""
    operand = operand_name(precision)
    max_out, max_in = (64 if width <= 64 else 128 for width in (n_out, n_in))
    choices = narrow_tile_choices(operand, max_out, max_in)
    tile = next((tile for tile in choices if tile.shared_bytes(operand) <= limits.shared_bytes), None)
    if tile is None:
        return None
    split = narrow_split(batch_size)
    per_lane = _per_lane(tile.max_out * tile.max_in // (32 * NARROW_WARPS), tile.max_out // 64)
    return LayerPlan(
        LaunchPlan(tile.variant(operand), split.splits, 32 * NARROW_WARPS, tile.shared_bytes(operand)),
        split,
        partials=split.splits * NARROW_WARPS * 32 * per_lane,
        counters=NARROW_WARPS * split.counters,
        persistent=False,
        why=f"one launch on tensor cores: each of {split.splits} blocks reads its rows once for dW, db and da",
    )


def _mma_tile(batch_size: int, n_out: int, n_in: int) -> tuple[int, SplitK]:
    """Choose the larger tile if it makes work tiles enough, else the smaller one; split the batch for it."""
    for tile in (128, 64):
        tiles_o, tiles_i = ceil_div(n_out, tile), ceil_div(n_in, tile)
        if max(n_out, n_in) <= NARROW:  # where only the device keeps a layer from `layer_mma_narrow`: the same bits
            split = narrow_split(batch_size)
        else:
            wanted = max(1, split_k.WORK_TILES_WANTED // (tiles_o * tiles_i))
            split = split_batch(batch_size, wanted, split_k.SMALLEST_SPLIT, split_k.LARGEST_SPLIT)
        # With da's tiles in any case: dW has the same bits without them.
        if (split.splits * tiles_o + ceil_div(batch_size, tile)) * tiles_i >= split_k.WORK_TILES_WANTED:
            break
    return tile, split


def _mma_layer(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits, need_da_prev: bool
) -> LayerPlan:
    operand = operand_name(precision)
    tile, split = _mma_tile(batch_size, n_out, n_in)
    tiles_o, tiles_i = ceil_div(n_out, tile), ceil_div(n_in, tile)
    work_tiles = (split.splits * tiles_o + need_da_prev * ceil_div(batch_size, tile)) * tiles_i
    per_lane = _per_lane(tile * tile // MMA_THREADS, tile // 32)
    variant = mma_variant("layer_mma", operand, tile)
    shared = mma_shared(operand, tile)
    room = (limits.shared_bytes + SHARED_RESERVED) // (shared + SHARED_RESERVED)
    in_flight = limits.multiprocessors * max(1, min(2 if tile == 128 else 3, room))
    return LayerPlan(
        LaunchPlan(variant, min(work_tiles, in_flight), MMA_THREADS, shared),
        split,
        partials=split.splits * tiles_o * tiles_i * MMA_THREADS * per_lane,
        counters=MMA_THREADS // 32 * tiles_o * tiles_i * split.counters,
        persistent=True,
        why=f"one launch on tensor cores: {work_tiles} tiles of {tile} x {tile} of dW ({split.splits} splits) and da",
    )


def _simt_layer(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits, need_da_prev: bool
) -> LayerPlan:
    accum = accumulator_name(precision)
    tile = _simt_tile(accum, min(n_out, n_in), batch_size, n_in)
    tiles_o, tiles_i = ceil_div(n_out, tile), ceil_div(n_in, tile)
    tiles_da = ceil_div(batch_size, tile) * tiles_i
    # No smaller than a work tile of da, which cannot be cut: that would only add partial sums.
    smallest = max(SIMT_SMALLEST_SPLIT, n_out)
    split = split_batch(batch_size, ceil_div(SIMT_WORK_TILES_WANTED, tiles_o * tiles_i), smallest, SIMT_LARGEST_SPLIT)
    work_tiles = split.splits * tiles_o * tiles_i + need_da_prev * tiles_da
    partials = tile * tile + SIMT_THREADS * (2 if accum == "double" else 4)
    return LayerPlan(
        LaunchPlan(simt_variant("layer_simt", accum, tile), work_tiles, SIMT_THREADS, simt_shared(accum, tile)),
        split,
        partials=split.splits * tiles_o * tiles_i * partials if split.splits > 1 else 0,
        counters=8 * tiles_o * tiles_i * split.counters,
        persistent=False,
        why=f"one launch: {work_tiles} tiles of {tile} x {tile} of dW ({split.splits} splits) and da",
    )


def simt_tiles(accum: str) -> tuple[int, ...]:
    """List the tiles that there are without tensor cores."""
    return (64,) if accum == "double" else (128, 64)


def _simt_tile(accum: str, narrowest: int, rows: int, columns: int) -> int:
    """Choose a tile for so many rows and columns of da or of a forward pass."""
    enough = ceil_div(rows, 128) * ceil_div(columns, 128) >= SIMT_LARGE_TILES_WANTED
    return 128 if narrowest > 64 and enough and 128 in simt_tiles(accum) else 64


def mma_variant(entry: str, operand: str, tile: int) -> Variant:
    """Name a kernel of large tiles on tensor cores."""
    return Variant("layer/layer_mma.cu", entry, (f"Element={operand}", f"TILE={tile}"), tensor_cores=True)


def simt_variant(entry: str, accum: str, tile: int) -> Variant:
    """Name a kernel without tensor cores."""
    return Variant("layer/layer_simt.cu", entry, (f"Accum={accum}", f"TILE={tile}"))


@functools.cache
def forward_plan(batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits) -> ForwardPlan:
    """Plan a layer's forward pass: one block to a tile of the output, but on Hopper.

    Raises:
        BackendError: the device cannot run such products.
    """
    if limits.wgmma and precision.sixteen_bit and max(n_out, n_in) <= wgmma_plans.WIDEST:
        return wgmma_plans.narrow_forward_plan(batch_size, n_out, n_in, precision, limits)
    if limits.wgmma and precision.sixteen_bit and wgmma_wide_plans.takes_forward(batch_size, n_out):
        return wgmma_wide_plans.forward_plan(batch_size, n_out, precision, limits)
    if uses_tensor_cores(precision):
        _require_tensor_cores(precision, limits)
        operand = operand_name(precision)
        wide = ceil_div(batch_size, 128) * ceil_div(n_out, 128) >= split_k.WORK_TILES_WANTED and n_out > 64
        rows = columns = 128 if wide else 64
        variant = mma_variant("forward_mma", operand, rows)
        shared, threads = mma_shared(operand, rows), MMA_THREADS
    else:
        accum = accumulator_name(precision)
        rows = columns = _simt_tile(accum, n_out, batch_size, n_out)
        variant = simt_variant("forward_simt", accum, rows)
        shared, threads = simt_shared(accum, rows), SIMT_THREADS
    return ForwardPlan(LaunchPlan(variant, ceil_div(batch_size, rows) * ceil_div(n_out, columns), threads, shared))
