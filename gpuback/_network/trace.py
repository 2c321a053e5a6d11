"""Every intermediate array of one batch, forward and backward: to look inside, to teach, to check."""

from __future__ import annotations

from dataclasses import dataclass

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.typing import Array
from gpuback._network.layers import BoundNetwork


@dataclass(repr=False)
class Trace:
    """All arrays of a batch. Each list has L + 1 entries, indexed by the layer k as in the equations.

    Arrays that do not exist are None: a[0], da[0], dW[0], db[0] (the input is given), h[L] (the output is `output`) and
    dh[L] (loss and output function go straight to da[L]). 16-bit values stand in float32 arrays. The da and dh of
    float16 are shown without the power of two that they carry.

    Attributes:
        a: a_1 … a_L, (B, n_k) pre-activations; rounded to the operands' dtype where g' is computed from them.
        h: h_0 … h_{L−1}, (B, n_k), rounded to the operands' dtype: what products read.
        output: ŷ (B, n_L).
        loss: the mean over the batch.
        dh: dh_0 … dh_{L−1}, (B, n_k): ∂loss/∂h_k = da_{k+1} W_{k+1}; dh_0 is ∂loss/∂x.
        da: da_1 … da_L, (B, n_k): ∂loss/∂a_k, with the mean's 1/B and the sample weight in it: for softmax and
            cross-entropy da_L = (ŷ − e(y))/B.
        dW, db: dW_1 … dW_L (nO, nI) and db_1 … db_L (nO,).
    """

    output: Array
    loss: float
    a: list[Array]
    h: list[Array]
    dh: list[Array]
    da: list[Array]
    dW: list[Array]
    db: list[Array]

    def __repr__(self) -> str:
        lists = {name: getattr(self, name) for name in ("a", "h", "dh", "da", "dW", "db")}
        shapes = [
            f"  {name}: {[None if part is None else part.shape for part in parts]}" for name, parts in lists.items()
        ]
        return "\n".join([f"Trace of a batch: loss {self.loss:.6g}, output {self.output.shape}", *shapes])


def trace(
    architecture: Architecture,
    theta: Array,
    ops: Ops,
    x: Array,
    y: Array,
    sample_weight: Array | None,
) -> Trace:
    """Run the passes of `gpuback._network.backprop` on the batch as one block, and keep every array."""
    sizes, precision, batch_size = architecture.sizes, architecture.precision, len(x)
    depth, total, scale = len(sizes) - 1, precision.accumulator, precision.gradient_scale(batch_size)
    workspace = ops.workspace(batch_size, sizes, precision)
    activations = [None, *architecture.hidden_activations, None]
    network = BoundNetwork.of(architecture, theta, ops)
    network.refresh()
    operands, biases = network.weights, network.biases

    h: list[Array] = [ops.bind_load(sizes[0], precision, workspace)(x)]
    a: list[Array] = [None]
    for k in range(1, depth):
        h.append(workspace.hidden(sizes[k]))
        a.append(workspace.hidden(sizes[k]))
        ops.bind_forward(operands[k - 1], biases[k - 1], h[k], a[k], activations[k], workspace)(h[k - 1])
    top = workspace.output(sizes[depth])
    ops.bind_forward(operands[depth - 1], biases[depth - 1], top, None, None, workspace)(h[depth - 1])
    a.append(ops.copy_for_display(top, total))
    output = ops.empty(a[depth].shape, total)
    ops.bind_output(architecture.output, top, workspace)(output)

    top[...] = a[depth]
    da: list[Array] = [None] * depth + [workspace.output_delta(top)]
    loss = ops.bind_loss(architecture.loss_row, architecture.output, top, da[depth], batch_size / scale, workspace)(
        y, sample_weight
    )
    dh, dW, db = ([None] * (depth + 1) for _ in range(3))
    for k in range(depth, 0, -1):
        dh[k - 1] = ops.empty((batch_size, sizes[k - 1]), total)
        dW[k], db[k] = ops.empty((sizes[k], sizes[k - 1]), total), ops.empty(sizes[k], total)
        backward = ops.bind_backward(da[k], operands[k - 1], dh[k - 1], None, None, scale, workspace)
        backward(h[k - 1], dW[k], db[k], False)
        below = activations[k - 1]
        if below is not None:  # once more, now with g': training goes to da directly and never holds dh
            da[k - 1] = workspace.hidden(sizes[k - 1])
            source = h[k - 1] if below.derivative_from == "h" else a[k - 1]
            backward = ops.bind_backward(da[k], operands[k - 1], da[k - 1], below, source, scale, workspace)
            backward(h[k - 1], dW[k], db[k], False)
    return Trace(
        output,
        float(ops.mean_loss([loss], batch_size)),
        [None, *(ops.copy_for_display(array, total) for array in a[1:])],
        [*(ops.copy_for_display(array, total) for array in h), None],
        dh,
        [None, *(ops.copy_for_display(array, total, 1.0 / scale) for array in da[1:])],
        dW,
        db,
    )
