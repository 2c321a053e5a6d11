"""Launch plans of the kernels over rows and elements: losses, outputs, copies, per-sample gradients, updates, splits.

Pure functions from a shape and a number format. Sums over the batch follow from the shape alone, not from the device.
"""

from __future__ import annotations

from typing import Literal

from gpuback._backends.cuda.formats import Accum, accumulator_name, operand_name
from gpuback._core.integers import ceil_div
from gpuback._core.precision import Precision
from gpuback._cuda.coefficients import COEFFICIENTS
from gpuback._cuda.launch import LaunchPlan, Variant
from gpuback.errors import ShapeError

VectorEntry = Literal[
    "set_hyper_parameters",
    "mean_of_blocks",
    "scale_weights",
    "unscale",
    "update_scale",
    "choose_scale",
    "add_unscaled",
    "begin_step",
    "vector_norm",
    "sgd",
    "adam",
    "sgd_in_ranges",
    "adam_in_ranges",
    "largest",
    "exact_sum",
]
"""The kernels over flat vectors."""

THREADS = 256
"""In a block."""

LARGEST_ROW_GRID = 1024
"""Blocks of kernels that go over rows or elements. Sums over the batch depend on it."""

LONGEST_EXACT_SUM = 2**31
"""Terms of which limbs of 21 bits still add up exactly in float64."""


def _row_blocks(rows: int) -> int:
    """Count the blocks: eight rows to a block at a time."""
    return min(ceil_div(rows, 8), LARGEST_ROW_GRID)


def _row_variant(source: str, entry: str, precision: Precision) -> Variant:
    return Variant(source, entry, (f"Accum={accumulator_name(precision)}", f"Element={operand_name(precision)}"))


def loss_plan(batch_size: int, precision: Precision) -> LaunchPlan:
    """Plan each row's loss and da, and the mean loss."""
    variant = _row_variant("elementwise/losses.cu", "loss_rows", precision)
    return LaunchPlan(variant, _row_blocks(batch_size), THREADS, 8 * 8)


def output_plan(batch_size: int, precision: Precision) -> LaunchPlan:
    """Plan the network's output ŷ from its pre-activations."""
    variant = _row_variant("elementwise/losses.cu", "output_rows", precision)
    return LaunchPlan(variant, _row_blocks(batch_size), THREADS)


def output_delta_plan(batch_size: int, precision: Precision) -> LaunchPlan:
    """Plan each row's da from ∂loss/∂ŷ, and the mean of given losses."""
    variant = _row_variant("elementwise/losses.cu", "output_delta_rows", precision)
    return LaunchPlan(variant, _row_blocks(batch_size), THREADS, 8 * 8)


def copy_plan(
    entry: Literal["copy_rows", "copy_elements", "copy_weights"], rows: int, precision: Precision
) -> LaunchPlan:
    """Plan copies in the operands' format."""
    variant = _row_variant("elementwise/copies.cu", entry, precision)
    return LaunchPlan(variant, _row_blocks(rows), THREADS)


PerSampleEntry = Literal["add_norms", "clip_rows", "outer_rows"]
"""The kernels over each sample by itself."""


def per_sample_plan(entry: PerSampleEntry, rows: int, precision: Precision) -> LaunchPlan:
    """Plan a warp for each of so many rows: samples, or samples' units."""
    variant = _row_variant("elementwise/per_sample.cu", entry, precision)
    return LaunchPlan(variant, _row_blocks(rows), THREADS)


def vector_plan(entry: VectorEntry, length: int, accum: Accum) -> LaunchPlan:
    """Plan a kernel over a flat vector: four numbers a thread at a time.

    Raises:
        ShapeError: more terms than add up exactly.
    """
    exact, adds_up = entry in ("largest", "exact_sum"), entry in ("begin_step", "vector_norm", "largest", "exact_sum")
    if exact and length > LONGEST_EXACT_SUM:
        raise ShapeError(f"an exact sum: expected at most {LONGEST_EXACT_SUM} terms, got {length}")
    blocks = min(ceil_div(length, 4 * THREADS), 256 if adds_up else LARGEST_ROW_GRID)
    if exact:
        source = "exact/exact_sums.cu"
    elif entry in ("scale_weights", "unscale", "update_scale", "choose_scale", "add_unscaled"):
        source = "elementwise/loss_scaling.cu"
    else:
        source = "elementwise/optimizers.cu"
    return LaunchPlan(Variant(source, entry, (f"Accum={accum}",)), blocks, THREADS, 3 * 8 * 8 if adds_up else 0)


# Exact products and losses

ExactEntry = Literal[
    "largest_of_rows",
    "largest_of_columns",
    "split_operands",
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
    """Plan a kernel over a matrix, a warp to a part of a row. The grid changes no bit."""
    operand = f"Element={operand_name(precision)}"
    if entry in ("largest_of_rows", "largest_of_columns", "split_operands"):
        variant = Variant("exact/split_operands.cu", entry, (operand,))
    else:
        variant = Variant("exact/combine_products.cu", entry, (operand, *COEFFICIENTS))
    if entry == "largest_of_rows":
        blocks = _row_blocks(rows)
    elif entry == "largest_of_columns":
        groups = ceil_div(columns, 32)
        blocks = groups * max(1, min(ceil_div(rows, ROWS_OF_A_BLOCK), LARGEST_ROW_GRID // groups))
    else:
        blocks = _row_blocks(rows * ceil_div(columns, COLUMNS_OF_A_WARP))
    return LaunchPlan(variant, blocks, THREADS)


ExactRowEntry = Literal["exact_loss_rows", "exact_output_rows", "exact_output_delta_rows"]
"""The kernels over rows of the output layer."""


def exact_row_plan(entry: ExactRowEntry, rows: int, precision: Precision) -> LaunchPlan:
    """Plan each row's loss and da, or ŷ, or da from ∂loss/∂ŷ."""
    variant = Variant("exact/exact_losses.cu", entry, (f"Element={operand_name(precision)}", *COEFFICIENTS))
    return LaunchPlan(variant, _row_blocks(rows), THREADS)
