"""Compute how many blocks of a kernel one multiprocessor holds at a time, without a GPU."""

from __future__ import annotations

import re
from typing import NamedTuple

from gpuback._core.integers import ceil_div, round_up


class MultiprocessorLimits(NamedTuple):
    """The limits of one multiprocessor.

    Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".

    Attributes:
        warps, blocks: resident at a time.
        shared_bytes: shared memory of all its blocks.
        block_shared_bytes: the most that one block may have of it.
    """

    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int


LIMITS = {
    75: MultiprocessorLimits(32, 16, 64 * 1024, 64 * 1024),
    80: MultiprocessorLimits(64, 32, 164 * 1024, 163 * 1024),
    86: MultiprocessorLimits(48, 16, 100 * 1024, 99 * 1024),
    89: MultiprocessorLimits(48, 24, 100 * 1024, 99 * 1024),
    90: MultiprocessorLimits(64, 32, 228 * 1024, 227 * 1024),
    100: MultiprocessorLimits(64, 32, 228 * 1024, 227 * 1024),
    120: MultiprocessorLimits(48, 24, 100 * 1024, 99 * 1024),
}
# The same on all of them. Source: the same table, and the occupancy calculator of Nsight Compute for the units in
# which registers and shared memory are handed out and for what the system takes of each block's shared memory.
REGISTERS = 64 * 1024
REGISTER_UNIT = 256  # of a warp
WARP_UNIT = 4  # each of the four schedulers has a quarter of the registers
SHARED_UNIT = 128


class Occupancy(NamedTuple):
    """The blocks and warps that one multiprocessor holds.

    Attributes:
        blocks: how many; 0 if not even one fits.
        warps: their warps, as a fraction of the most there can be.
    """

    blocks: int
    warps: float


def occupancy(arch: str, registers: int, threads: int, shared_bytes: int) -> Occupancy | None:
    """Compute the occupancy of blocks of `threads` threads; None for an unknown architecture."""
    number = int(re.sub(r"\D", "", arch))
    limits = LIMITS.get(number)
    if limits is None:
        return None
    block_warps = ceil_div(threads, 32)
    warp_registers = round_up(max(registers, 1) * 32, REGISTER_UNIT)
    register_warps = REGISTERS // warp_registers // WARP_UNIT * WARP_UNIT
    system_bytes = 1024 if number >= 80 else 0
    block_bytes = round_up(shared_bytes + system_bytes, SHARED_UNIT)
    blocks = min(
        limits.blocks,
        limits.warps // block_warps,
        register_warps // block_warps,
        limits.shared_bytes // block_bytes if block_bytes else limits.blocks,
    )
    if shared_bytes > limits.block_shared_bytes:
        blocks = 0
    return Occupancy(blocks, blocks * block_warps / limits.warps)
