"""Lay out a network's parts in a block's shared memory and in the workspace.

It mirrors `Layer` of kernels/network/network_memory.cuh.
Widths are rounded up to multiples of 16.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpuback._backends.cuda.arguments import cases_of
from gpuback._backends.cuda.formats import uses_tensor_cores
from gpuback._core.architecture import Architecture
from gpuback._core.integers import round_up
from gpuback._core.precision import Precision

LAYER = np.dtype(
    [
        *((name, np.int32) for name in ("n_in", "n_out", "activation")),
        ("theta", np.int32),  # number of its first weight in θ
        *((name, np.int32) for name in ("w", "bias")),  # bytes of shared memory
        *((name, np.int32) for name in ("h", "a")),  # likewise: its inputs; the pre-activations behind them, or 0
        ("pitch", np.int32),  # operands from one row of its inputs, or of its weights, to the next
        *((name, np.int32) for name in ("row_h", "row_a", "row_da")),  # columns of the workspace before each matrix
    ]
)
"""An entry of the layout, field by field the kernels' struct `Layer`. One for each layer, and one for the output."""

CIRCULAR_BUFFER_BYTES = 64 * 512
"""Through which a block's warps read partial sums, where the batch tile was."""

LOSS_SUM_BYTES = 32 * 8
"""Of a split's losses, behind the layout."""


class _Places:
    """An allocator of places one after the other.

    Attributes:
        end: the first free place.
    """

    def __init__(self, start: int) -> None:
        self.end = start

    def take(self, size: int) -> int:
        """Return the start of the next `size` places."""
        start = self.end
        self.end += size
        return start


def step_layout(architecture: Architecture, tile_b: int) -> tuple[NDArray[np.void], int]:
    """Lay out a step in one launch; count all bytes of shared memory that it takes."""
    sizes, precision = architecture.sizes, architecture.precision
    layers = _layers(architecture)
    memory = _Places(table_bytes(len(sizes) - 1) + LOSS_SUM_BYTES)
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        layers["bias"][k] = memory.take(4 * round_up_16(n_out))
        layers["w"][k] = memory.take(round_up_16(n_out) * _row_bytes(n_in, precision))
    batch_tile = memory.end
    for k, (width, kept) in enumerate(zip(sizes[:-1], _keeps_a(architecture), strict=True)):
        layers["h"][k] = memory.take(tile_b * _row_bytes(width, precision))
        if kept:
            layers["a"][k] = memory.take(tile_b * _row_bytes(width, precision))
    layers["h"][-1] = memory.take(tile_b * _top_row_bytes(sizes[-1], precision))
    return layers, max(memory.end, batch_tile + CIRCULAR_BUFFER_BYTES)


def passes_layout(
    architecture: Architecture, tile_b: int, all_weights: bool, backward: bool
) -> tuple[NDArray[np.void], int, int]:
    """Lay out the passes in one launch; count all bytes of shared memory and the columns of the workspace.

    The inputs of neighbouring layers take turns at two places. Without `backward` there is no workspace.
    """
    sizes, precision = architecture.sizes, architecture.precision
    depth = len(sizes) - 1
    kept = _keeps_a(architecture) if backward else [False] * depth
    layers, start = _layers(architecture), table_bytes(depth) + LOSS_SUM_BYTES
    weights_end = start
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        memory = _Places(weights_end if all_weights else start)
        layers["bias"][k] = memory.take(4 * round_up_16(n_out))
        layers["w"][k] = memory.take(round_up_16(n_out) * _row_bytes(n_in, precision))
        weights_end = max(weights_end, memory.end)
    memory = _Places(weights_end)
    for turn in range(min(2, depth)):
        widest = tile_b * _row_bytes(max(sizes[:-1][turn::2]), precision)
        layers["h"][turn:-1:2] = memory.take(widest)
        if any(kept[turn::2]):
            layers["a"][turn:-1:2] = np.where(kept[turn::2], memory.take(widest), 0)
    layers["h"][-1] = memory.take(tile_b * _top_row_bytes(sizes[-1], precision))
    workspace = _Places(0)
    for k, width in enumerate(sizes if backward else ()):
        if k < depth:
            layers["row_h"][k] = workspace.take(round_up_16(width))
            if kept[k]:
                layers["row_a"][k] = workspace.take(round_up_16(width))
        if k > 0:
            layers["row_da"][k] = workspace.take(round_up_16(width))
    return layers, memory.end, workspace.end


def slab_layout(architecture: Architecture) -> NDArray[np.void]:
    """Lay out a step by wgmma: widths, activations and places in θ. Where parts lie, the kernel knows by itself."""
    return _layers(architecture)


def slab_bytes(width: int, most_layers: int) -> int:
    """Count the bytes of shared memory of a step by wgmma: in kernels/network/fused_step_wgmma.cu, part by part."""
    row_bytes, rows, strips = 2 * width, 128, 8
    weights, inputs = most_layers * width * row_bytes, most_layers * rows * row_bytes
    deltas = strips * round_up(16 * 4 * (width + 8), 8 * row_bytes)
    ones, biases, barriers = 16 * row_bytes, most_layers * width * 4, round_up(8 * (4 + most_layers), 16)
    table, loss_sums, bounds = (most_layers + 1) * LAYER.itemsize, 8 * 256, 8
    return weights + inputs + deltas + ones + biases + barriers + table + loss_sums + bounds


def table_bytes(depth: int) -> int:
    """Count the bytes of shared memory of the layout of `depth` layers."""
    return round_up((depth + 1) * LAYER.itemsize, 16)


def padding(precision: Precision) -> int:
    """Count the numbers that pad a row of operands, so that its fragments lie in different banks."""
    return 8 if uses_tensor_cores(precision) else 4


def round_up_16(width: int) -> int:
    """Round a width up to a multiple of 16."""
    return round_up(width, 16)


def _layers(architecture: Architecture) -> NDArray[np.void]:
    """Fill in widths, activations, places in θ, and pitches."""
    sizes, hidden = architecture.sizes, architecture.hidden_activations
    precision, item = architecture.precision, architecture.precision.operand.itemsize
    layers = np.zeros(len(sizes), LAYER)
    layers["n_in"] = sizes
    layers["n_out"][:-1] = sizes[1:]
    layers["activation"][: len(hidden)] = cases_of(hidden).numbers
    layers["theta"][:-1] = architecture.layout.weight_starts
    layers["pitch"][:-1] = [_row_bytes(width, precision) // item for width in sizes[:-1]]
    layers["pitch"][-1] = _top_row_bytes(sizes[-1], precision) // item
    return layers


def _row_bytes(width: int, precision: Precision) -> int:
    return (round_up_16(width) + padding(precision)) * precision.operand.itemsize


def _top_row_bytes(width: int, precision: Precision) -> int:
    """Of a row of a_L, which is float32."""
    return (round_up_16(width) + (4 if precision.sixteen_bit else padding(precision))) * 4


def _keeps_a(architecture: Architecture) -> list[bool]:
    """Say for the inputs of each layer whether the pre-activations that they came from are kept."""
    return [False, *(g.derivative_from == "a" for g in architecture.hidden_activations)]
