"""What launch plans of a layer's passes say: the launch, how sums over the batch are cut, which matrices go by map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gpuback._backends.cuda.split_k import SplitK
from gpuback._cuda.launch import LaunchPlan

BOX_COLUMNS = 64
"""Of 16 bits each: the 128 bytes that a panel's rows have."""


class Box(NamedTuple):
    """A kernel's parameter that is a TensorMap.

    Attributes:
        parameter: its name, such as "h_map".
        matrix: the name of the matrix where kernels take it as a pointer, such as "h_bi"; None for one that this
            launch does not look at.
        rows: of what one copy takes; its columns are BOX_COLUMNS.
    """

    parameter: str
    matrix: str | None
    rows: int


class ForwardPlan(NamedTuple):
    """The launch of one layer's forward pass.

    Attributes:
        launch: what is launched.
        boxes: the parameters that are maps; none for kernels that take pointers.
    """

    launch: LaunchPlan
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """The launch of one layer's backward pass.

    Attributes:
        launch: what is launched.
        split: how the sum over the batch is cut.
        partials: numbers of workspace for partial sums.
        counters: how many arrival counters, all 0 before and after.
        persistent: whether blocks take one work tile after the other, by a counter that the kernel is given.
        why: in words, for `explain`.
        boxes: the parameters that are maps; none for kernels that take pointers.
    """

    launch: LaunchPlan
    split: SplitK
    partials: int
    counters: int
    persistent: bool
    why: str
    boxes: tuple[Box, ...] = ()
