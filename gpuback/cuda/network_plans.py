"""Launch plans of the kernels that take a whole narrow network at once; see kernels/network_narrow.cu."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuback.cuda import plans
from gpuback.cuda.launch import DeviceLimits, LaunchPlan, Variant
from gpuback.cuda.plans import Chains
from gpuback.precision import Precision

WARPS, TILE = 8, 32
"""Of a block; rows and columns of a warp's tile. As in kernels/network_narrow.cu."""

RING_BYTES = WARPS * 8 * 512
"""Through which a block's warps read partial results, where the slab was."""

LAYER_NUMBERS = 12
"""Of an entry of the layout."""

MOST_ROWS = 128
"""Of a slab: then each warp has a tile of a layer of 64."""


class Shape(NamedTuple):
    """A kernel's limits: how wide layers may be, and how many it holds the sums of dW for in registers."""

    width: int
    layers: int

    @property
    def entry(self) -> str:
        return f"network_step_{self.width}x{self.layers}"


SHAPES = (Shape(32, 16), Shape(64, 8), Shape(128, 2))
"""The kernels there are, the better first."""


@dataclass(frozen=True)
class Hidden:
    """A hidden layer's activation: the kernels' number for it, and whether its g' is computed from a."""

    activation: int
    derivative_from_a: bool


@dataclass(frozen=True)
class NetworkPlan:
    """How a step of a whole network is launched.

    Attributes:
        launch: what is launched.
        layout: what lies where in a block's shared memory: a row of nine numbers for each layer, and one more.
        rows: of a slab.
        chains: how the batch is cut.
        partials: numbers of workspace for partial results.
        slots: pieces that gradients could be dealt with in; `pieces` of them have anything to add.
        why: in words, for `explain`.
    """

    launch: LaunchPlan
    layout: NDArray[np.int32]
    rows: int
    chains: Chains
    partials: int
    slots: int
    pieces: int
    why: str

    @property
    def counters(self) -> int:
        """Four for the launch, and for each slot those of its chains."""
        return 4 + self.slots * self.chains.counters


def _whole(width: int) -> int:
    return -(-width // 16) * 16


def _layout(
    sizes: tuple[int, ...], hidden: tuple[Hidden, ...], precision: Precision, rows: int
) -> tuple[NDArray[np.int32], int]:
    """What lies where, and how many bytes it takes in all."""
    size, depth = precision.operand.itemsize, len(sizes) - 1
    pad = 8 if plans.uses_tensor_cores(precision) else 4
    table = np.zeros((depth + 1, LAYER_NUMBERS), np.int32)
    end = -(-table.nbytes // 16) * 16
    theta = 0
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        table[k, :4] = n_in, n_out, hidden[k].activation if k < depth - 1 else 0, theta
        theta += n_out * (n_in + 1)
    for k, (n_in, n_out) in enumerate(pairwise(sizes)):
        bias, db = end, end + 4 * _whole(n_out)
        w = db + 4 * _whole(n_out)
        end = w + _whole(n_out) * (_whole(n_in) + pad) * size
        table[k, 4:7] = w, bias, db
    slab = end
    for k, width in enumerate(sizes[:-1]):
        table[k, 7] = end
        bytes_of_layer = rows * (_whole(width) + pad) * size
        end += bytes_of_layer
        if k and hidden[k - 1].derivative_from_a:
            table[k, 8] = end
            end += bytes_of_layer
    table[depth, 0], table[depth, 7] = sizes[-1], end
    end += rows * (_whole(sizes[-1]) + (4 if size == 2 else pad)) * 4
    return table, max(end, slab + RING_BYTES)


def _pieces(sizes: tuple[int, ...], width: int) -> int:
    """Parts of all dW that have anything in them: 2 x 4 warps (32 wide: 2 x 2) stand over each."""
    rows, columns = width // 2, max(width // 4, 16)
    return sum(min(2, -(-n_out // rows)) * -(-n_in // columns) for n_in, n_out in pairwise(sizes))


def _held(width: int) -> int:
    """Numbers of a piece that a lane holds: of dW, and of db by fours."""
    rows, columns = width // 2, max(width // 4, 16)
    return rows * columns // 32 + -(-(-(-rows // 32)) // 4) * 4


def step_plan(
    batch_size: int,
    sizes: tuple[int, ...],
    hidden: tuple[Hidden, ...],
    precision: Precision,
    limits: DeviceLimits,
) -> NetworkPlan | str:
    """A whole step in one launch; or, in words, why there is no such launch."""
    if precision.name == "float64" or precision.reproducible:
        return f"no kernel for a whole network computes in {'reproducible mode' if precision.reproducible else 'float64'}"
    depth, widest = len(sizes) - 1, max(sizes)
    shape = next((shape for shape in SHAPES if widest <= shape.width and depth <= shape.layers), None)
    if shape is None:
        known = " or ".join(f"{shape.layers} layers of {shape.width}" for shape in SHAPES)
        return f"{depth} layers up to {widest} wide are more than registers hold: {known}"
    for rows in range(MOST_ROWS, 0, -TILE):
        layout, shared_bytes = _layout(sizes, hidden, precision, rows)
        if shared_bytes <= limits.shared_bytes:
            break
    else:
        return f"a block needs {shared_bytes:,} bytes of shared memory, this device has {limits.shared_bytes:,}"
    chains = plans.narrow_chains(batch_size)
    slots = WARPS * depth
    return NetworkPlan(
        LaunchPlan(variant(shape, precision), min(chains.count, limits.multiprocessors), 32 * WARPS, shared_bytes),
        layout,
        rows,
        chains,
        partials=chains.count * slots * 32 * _held(shape.width),
        slots=slots,
        pieces=_pieces(sizes, shape.width),
        why=f"{chains.count} chains of {chains.rows} rows, in slabs of {rows}",
    )


def variant(shape: Shape, precision: Precision) -> Variant:
    """The kernel for such networks and operands."""
    tensor_cores = plans.uses_tensor_cores(precision)
    operand = precision.name if precision.sixteen_bit else "float"
    return Variant("network_narrow.cu", shape.entry, (f"OPERAND={operand}", f"TENSOR_CORES={int(tensor_cores)}"))
