"""A training step in numbers: which operation runs for each part and why, its FLOPs and its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture

EXACT_PRODUCTS = 3
"""How many float64 products a product takes with `reproducible=True`: P, and the two parts of Q."""


@dataclass(frozen=True)
class Step:
    """One operation: what it computes, what runs it and why, its floating-point operations, the bytes it moves."""

    name: str
    operation: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """The operations of one training step, in order, under a header for all of them. `print` shows a table."""

    header: str
    steps: tuple[Step, ...]

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    def __str__(self) -> str:
        rows = [(s.name, s.operation, f"{s.flops:,}", f"{s.bytes:,}") for s in self.steps]
        rows = [("step", "what runs", "FLOPs", "bytes"), *rows, ("total", "", f"{self.flops:,}", f"{self.bytes:,}")]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        return "\n".join([self.header, "", *lines])


def explain(architecture: Architecture, ops: Ops, batch_size: int) -> Explanation:
    """Plan one training step (forward, loss, backward, update) on a batch."""
    precision, sizes = architecture.precision, architecture.sizes
    operands = "TF32" if precision.tf32 else precision.name
    word = precision.accumulator.itemsize
    how = f"products of {operands} operands, sums in {precision.accumulator.name}"
    if precision.reproducible:
        how = f"products of {operands} operands, each by {EXACT_PRODUCTS} exact float64 ones of their slices"
    header = (
        f"{ops.name} backend, batch of {batch_size}: {ops.explain_batch(sizes, batch_size, precision)}\n"
        f"{how}; θ and ∇θ in {precision.accumulator.name}\n"
        f"FLOPs of matrix products and of the update; bytes of arrays read and written once"
    )

    def product(m: int, k: int, n: int) -> tuple[int, int]:
        """Return the FLOPs of (m, k) times (k, n), and the bytes of arrays between operands and result."""
        if not precision.reproducible:
            return 2 * m * k * n, 0
        slices, sums = 2 * (m * k + k * n), 2 * m * n
        return EXACT_PRODUCTS * 2 * m * k * n, 2 * 8 * (slices + sums)

    depth = len(sizes) - 1
    fused = ops.explain_network(architecture, batch_size)
    if fused is not None:
        launches, why = fused
        header += f"\n{('layer by layer', 'the whole network in one launch', 'in two launches')[len(launches)]}: {why}"
        if launches:
            return Explanation(header, _fused_network(architecture, batch_size, launches))
    steps = []
    for k in range(1, depth + 1):
        n_in, n_out = sizes[k - 1], sizes[k]
        then = f"bias and {architecture.activations[k - 1]}" if k < depth else "bias"
        moved = word * (batch_size * (n_in + n_out) + n_out * (n_in + 1))
        what = f"{ops.explain_forward(batch_size, n_out, n_in, precision)}, then {then}"
        flops, between = product(batch_size, n_in, n_out)
        steps.append(Step(f"forward {k}", what, flops, moved + between))
    n_top = sizes[-1]
    steps.append(
        Step("loss", f"{architecture.output} + {architecture.loss}: value and da", 0, word * 2 * batch_size * n_top)
    )
    for k in range(depth, 0, -1):
        n_in, n_out = sizes[k - 1], sizes[k]
        products = 2 if k > 1 else 1
        flops, between = product(n_out, batch_size, n_in)
        if k > 1:
            flops, between = (
                sum(both) for both in zip((flops, between), product(batch_size, n_out, n_in), strict=True)
            )
        what = ops.explain_backward(batch_size, n_out, n_in, precision, need_da_prev=k > 1)
        if k > 1:
            what += f", times {architecture.activations[k - 2]}'"
        moved = word * (batch_size * (n_out + n_in * products) + n_out * (n_in * products + 1))
        steps.append(Step(f"backward {k}", what, flops, moved + between))
    steps.append(
        Step(
            "update",
            "optimizer, one pass over θ",
            2 * architecture.layout.n_parameters,
            3 * word * architecture.layout.n_parameters,
        )
    )
    return Explanation(header, tuple(steps))


def _fused_network(architecture: Architecture, batch_size: int, launches: list[str]) -> tuple[Step, ...]:
    """List the operations of a fused network: one launch or two."""
    precision, sizes, n_parameters = architecture.precision, architecture.sizes, architecture.layout.n_parameters
    word, targets = precision.accumulator.itemsize, 8 if architecture.loss == "cross_entropy" else 4 * sizes[-1]
    product = 2 * batch_size * sum(n_in * n_out for n_in, n_out in pairwise(sizes))
    delta = product - 2 * batch_size * sizes[0] * sizes[1]  # the input has no da
    samples = batch_size * (word * sizes[0] + targets)
    update = 2 * n_parameters, 3 * word * n_parameters
    passes = "forward pass, loss, backward pass"
    if len(launches) == 1:
        what = f"{launches[0]}: {passes}, ∇θ, update"
        return (Step("step", what, 2 * product + delta + update[0], samples + update[1]),)
    rows = batch_size * precision.operand.itemsize * (sum(sizes[:-1]) + sum(sizes[1:]))  # every h and da
    return (
        Step("passes", f"{launches[0]}: {passes}", product + delta, samples + word * n_parameters + rows),
        Step("update", f"{launches[1]}: ∇θ, update", product + update[0], rows + update[1]),
    )
