"""Launch plans of wide layers on Hopper's tensor cores, by TMA and wgmma: tiles of 128 × 256, a persistent grid.

`layer_plans` asks here where the device's limits say `wgmma` and a layer is too wide for `wgmma_plans`. Which layers go
here, and the order in which sums are added, follow from the shape alone.
"""

from __future__ import annotations

from gpuback._backends.cuda.planned_layers import Box, ForwardPlan, LayerPlan
from gpuback._backends.cuda.split_k import SMALLEST_SPLIT, WORK_TILES_WANTED, SplitK, split_batch
from gpuback._backends.cuda.wgmma_plans import CONSUMER_WARPS, PANEL_BYTES, THREADS, largest_chain
from gpuback._core.integers import ceil_div
from gpuback._core.precision import Precision
from gpuback._cuda.hopper import SWITCH
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Variant

TILE_M, TILE_N = 128, 256
"""Rows and columns of a work tile."""

STAGES, BUFFERS = 4, 4
"""Stages of 64 of K in the circular buffer; panels for results on their way."""

SHARED_BYTES = (STAGES * (TILE_M + TILE_N) // 64 + BUFFERS) * PANEL_BYTES + 8 * (2 * STAGES + BUFFERS)
"""Of a block."""

FEWEST_WORK_TILES = WORK_TILES_WANTED // 2
"""Smaller layers leave most of a large GPU idle with tiles of this size."""

FEWEST_OUTPUTS = 129
"""Of a forward pass: with fewer, more than half of a tile is idle."""

DW_PER_PLACE, DB_PER_PLACE, DB_WARPS = 32 * TILE_N // 2, 128, 2
"""Numbers of a partial result of dW and of db, each of one warp; warps that add db of a tile."""


def _tiles(rows: int, columns: int) -> int:
    return ceil_div(rows, TILE_M) * ceil_div(columns, TILE_N)


def chains_of(batch_size: int, n_out: int, n_in: int) -> SplitK:
    """Cut the sum over the batch: a split of a tile of dW is one chain of additions."""
    wanted = max(1, WORK_TILES_WANTED // _tiles(n_out, n_in))
    return split_batch(batch_size, wanted, SMALLEST_SPLIT, largest_chain(batch_size))


def takes_layer(batch_size: int, n_out: int, n_in: int) -> bool:
    """Say whether a layer's backward pass has enough work for tiles of this size."""
    splits = chains_of(batch_size, n_out, n_in).splits
    return splits * _tiles(n_out, n_in) + _tiles(batch_size, n_in) >= FEWEST_WORK_TILES


def takes_forward(batch_size: int, n_out: int) -> bool:
    """Say whether a layer's forward pass has enough work for tiles of this size."""
    return n_out >= FEWEST_OUTPUTS and _tiles(batch_size, n_out) >= FEWEST_WORK_TILES


def variant(entry: str, operand: str) -> Variant:
    """Name `layer_wgmma` or `forward_wgmma`."""
    return Variant("layer/layer_wgmma.cu", entry, (f"Element={operand}",), tensor_cores=True, wgmma=True)


def layer_plan(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits, *, need_da_prev: bool = True
) -> LayerPlan:
    """Plan a layer's backward pass."""
    split, tiles = chains_of(batch_size, n_out, n_in), _tiles(n_out, n_in)
    work_tiles = split.splits * tiles + need_da_prev * _tiles(batch_size, n_in)
    dw_places, db_places = tiles * CONSUMER_WARPS, ceil_div(n_out, TILE_M) * DB_WARPS
    several = split.splits > 1
    return LayerPlan(
        _launch("layer_wgmma", precision, work_tiles, limits),
        split,
        partials=several * split.splits * (dw_places * DW_PER_PLACE + db_places * DB_PER_PLACE),
        counters=several * (dw_places + db_places) * split.counters,
        persistent=False,
        why=(
            f"one launch by TMA and wgmma ({SWITCH}): {work_tiles} tiles of {TILE_M} x {TILE_N} of dW "
            f"({split.splits} splits) and da"
        ),
        boxes=_BACKWARD_BOXES,
    )


def delta_plan(batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits) -> LayerPlan:
    """Plan da of the layer below by itself."""
    work_tiles = _tiles(batch_size, n_in)
    return LayerPlan(
        _launch("layer_wgmma", precision, work_tiles, limits),
        SplitK(0, chains_of(batch_size, n_out, n_in).rows_per_split),
        partials=0,
        counters=0,
        persistent=False,
        why=f"one launch by TMA and wgmma ({SWITCH}): {work_tiles} tiles of {TILE_M} x {TILE_N} of da",
        boxes=_BACKWARD_BOXES,
    )


def forward_plan(batch_size: int, n_out: int, precision: Precision, limits: DeviceLimits) -> ForwardPlan:
    """Plan a layer's forward pass."""
    launch = _launch("forward_wgmma", precision, _tiles(batch_size, n_out), limits)
    return ForwardPlan(
        launch,
        boxes=(
            Box("h_map", "h_bi", TILE_M),
            Box("w_map", "w_oi", TILE_N),
            Box("a_map", "a_bo", 64),
            Box("out_map", "out_bo", 64),
        ),
    )


def _launch(entry: str, precision: Precision, work_tiles: int, limits: DeviceLimits) -> LaunchPlan:
    blocks = min(work_tiles, limits.multiprocessors)
    return LaunchPlan(variant(entry, precision.name), blocks, THREADS, SHARED_BYTES)


_BACKWARD_BOXES = (
    Box("da_map", "da_bo", 64),
    Box("h_map", "h_bi", 64),
    Box("w_map", "w_oi", 64),
    Box("source_map", "source_bi", 64),
    Box("da_prev_map", "da_prev_bi", 64),
)
