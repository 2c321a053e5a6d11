"""Launch plans of layers on Hopper's tensor cores, by TMA and wgmma: 16-bit elements, nO up to 256.

`layer_plans` asks here first where the device's limits say `wgmma`. As everywhere, the order in which sums are added
follows from the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuback._backends.cuda.planned_layers import Box, ForwardPlan, LayerPlan
from gpuback._backends.cuda.split_k import SplitK, split_batch
from gpuback._core.integers import ceil_div
from gpuback._core.precision import Precision
from gpuback._cuda.hopper import SWITCH
from gpuback._cuda.launch import DeviceLimits, LaunchPlan, Variant

WIDEST = 256
"""nO of a layer that `layer_wgmma_narrow` takes; nO and nI of one that `forward_wgmma_narrow` takes."""

THREADS, CONSUMER_WARPS = 384, 8
"""In a block of these kernels."""

CLUSTER = 8
"""Blocks whose sums over the batch are added through each other's shared memory."""

CHAINS_WANTED, SMALLEST_CHAIN = 128, 128
"""Blocks that share the batch, and the least rows for each."""

LONG_BATCH, LARGEST_CHAIN, LARGEST_CHAIN_OF_LONG_BATCH = 8192, 2048, 4096
"""Rows of the batch that one accumulator adds up: more from a batch of so many rows on. Tensor cores truncate as they
add, so an accumulator's error grows with its rows, but the contract's bound grows with the root of the batch."""

PANEL_BYTES = 64 * 128
"""Of 64 rows and 64 columns of elements."""


@dataclass(frozen=True)
class NarrowPanels:
    """A variant of `layer_wgmma_narrow`.

    Attributes:
        max_out: the widest nO that it takes.
        columns: of nI, in a block.
        stages, stages_from_a: in the circular buffer; fewer where pre-activations are in them, too.
    """

    max_out: int
    columns: int
    stages: int
    stages_from_a: int

    def variant(self, operand: str, from_a: bool) -> Variant:
        defines = {"OUT": self.max_out, "IN": self.columns, "STAGES": self._stages(from_a), "SOURCE": int(from_a)}
        defines["CLUSTER"] = CLUSTER
        return Variant(
            "layer/layer_wgmma_narrow.cu",
            "layer_wgmma_narrow",
            (f"Element={operand}", *(f"{name}={value}" for name, value in defines.items())),
            tensor_cores=True,
            wgmma=True,
        )

    def shared_bytes(self, from_a: bool) -> int:
        """Count W, the stages, what is staged for each consumer, and the barriers."""
        across, stages = self.columns // 64, self._stages(from_a)
        stage = self.max_out // 64 + (2 if from_a else 1) * across
        staged = across if self.max_out > 128 else 2 * across
        w = self.max_out // 64 * across
        return (w + stages * stage + staged) * PANEL_BYTES + 8 * (3 * stages + 3)

    def _stages(self, from_a: bool) -> int:
        return self.stages_from_a if from_a else self.stages

    @property
    def packs_per_lane(self) -> int:
        """Count what a lane brings to the reduction, 16 bytes each: of dW, and of db in the first column of blocks."""
        rows = self.max_out * self.columns // 128 + ceil_div(self.max_out, 128)
        return ceil_div(rows, CLUSTER * CONSUMER_WARPS)


NARROW_PANELS = (NarrowPanels(64, 64, 8, 6), NarrowPanels(128, 128, 5, 3), NarrowPanels(256, 128, 3, 2))


def narrow_panels(n_out: int, n_in: int) -> NarrowPanels:
    """Choose the smallest variant that takes the layer."""
    small, middle, large = NARROW_PANELS
    return small if max(n_out, n_in) <= 64 else middle if n_out <= 128 else large


def largest_chain(batch_size: int) -> int:
    """Return the most rows of the batch that one accumulator may add up."""
    return LARGEST_CHAIN if batch_size < LONG_BATCH else LARGEST_CHAIN_OF_LONG_BATCH


def chains_of(batch_size: int, columns_of_blocks: int) -> SplitK:
    """Cut the batch for so many columns of blocks: a split is a cluster's rows, a chain for each of its blocks."""
    clusters_wanted = max(1, CHAINS_WANTED // columns_of_blocks // CLUSTER)
    chains = split_batch(batch_size, clusters_wanted * CLUSTER, SMALLEST_CHAIN, largest_chain(batch_size))
    return SplitK(ceil_div(chains.splits, CLUSTER), CLUSTER * chains.rows_per_split)


def narrow_layer_plan(
    batch_size: int, n_out: int, n_in: int, precision: Precision, *, need_da_prev: bool = True, from_a: bool = False
) -> LayerPlan:
    """Plan the backward pass of a layer with nO up to WIDEST; `from_a` as in `layer_plans.layer_plan`."""
    panels, from_a = narrow_panels(n_out, n_in), from_a and need_da_prev
    columns = ceil_div(n_in, panels.columns)
    split = chains_of(batch_size, columns)
    chains = split.splits * CLUSTER
    warps = columns * CLUSTER * CONSUMER_WARPS
    return LayerPlan(
        _narrow_launch(panels, precision, columns * chains, from_a),
        split,
        partials=split.splits * warps * 32 * 4 * panels.packs_per_lane,
        counters=warps * split.counters,
        persistent=False,
        why=(
            f"one launch by TMA and wgmma ({SWITCH}): each of {columns * chains} blocks reads its rows once for dW, "
            f"db and da" + (f" of {panels.columns} inputs" if columns > 1 else "")
        ),
        boxes=_narrow_boxes(panels, h="h_bi", source="source_bi" if from_a else None),
    )


def narrow_delta_plan(batch_size: int, n_out: int, n_in: int, precision: Precision) -> LayerPlan:
    """Plan da of the layer below by itself, for a layer with nO up to WIDEST."""
    panels = narrow_panels(n_out, n_in)
    columns = ceil_div(n_in, panels.columns)
    split = chains_of(batch_size, columns)
    blocks = columns * split.splits * CLUSTER
    return LayerPlan(
        _narrow_launch(panels, precision, blocks, from_a=False),
        split,
        partials=0,
        counters=0,
        persistent=False,
        why=f"one launch by TMA and wgmma ({SWITCH}): {blocks} blocks, W in the shared memory of each",
        boxes=_narrow_boxes(panels, h="source_bi", source=None),  # the kernel has one place for h or a in a stage
    )


def _narrow_launch(panels: NarrowPanels, precision: Precision, blocks: int, from_a: bool) -> LaunchPlan:
    variant = panels.variant(precision.name, from_a)
    return LaunchPlan(variant, blocks, THREADS, panels.shared_bytes(from_a), CLUSTER)


def _narrow_boxes(panels: NarrowPanels, h: str, source: str | None) -> tuple[Box, ...]:
    return (
        Box("da_map", "da_bo", 64),
        Box("h_map", h, 64),
        Box("w_map", "w_oi", panels.max_out),
        Box("source_map", source, 64),
        Box("da_prev_map", "da_prev_bi", 64),
    )


@dataclass(frozen=True)
class ForwardPanels:
    """A variant of `forward_wgmma_narrow`.

    Attributes:
        widest: nO and nI that it takes.
        stages: in the circular buffer.
    """

    widest: int
    stages: int

    def variant(self, operand: str) -> Variant:
        defines = f"Element={operand}", f"OUT={self.widest}", f"IN={self.widest}", f"STAGES={self.stages}"
        return Variant("layer/forward_wgmma_narrow.cu", "forward_wgmma_narrow", defines, tensor_cores=True, wgmma=True)

    @property
    def shared_bytes(self) -> int:
        """Count W, the stages, the biases and the barriers."""
        across = self.widest // 64
        return (across * across + self.stages * across) * PANEL_BYTES + 4 * self.widest + 8 * (3 * self.stages + 1)


FORWARD_PANELS = (ForwardPanels(64, 16), ForwardPanels(128, 12), ForwardPanels(256, 3))


def narrow_forward_plan(
    batch_size: int, n_out: int, n_in: int, precision: Precision, limits: DeviceLimits
) -> ForwardPlan:
    """Plan the forward pass of a layer with nO and nI up to WIDEST: a block for each multiprocessor.

    A block takes an even number of 64 rows where there are so many, as it has two consumers.
    """
    panels = next(panels for panels in FORWARD_PANELS if max(n_out, n_in) <= panels.widest)
    blocks = min(ceil_div(batch_size, 128), limits.multiprocessors)
    return ForwardPlan(
        LaunchPlan(panels.variant(precision.name), blocks, THREADS, panels.shared_bytes),
        boxes=(
            Box("h_map", "h_bi", 64),
            Box("w_map", "w_oi", panels.widest),
            Box("a_map", "a_bo", 64),
            Box("out_map", "out_bo", 64),
        ),
    )
