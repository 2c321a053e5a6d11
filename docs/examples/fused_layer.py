"""Write back-propagation by hand, with `gpuback.fused_backward` for each layer.

Run: python docs/examples/fused_layer.py
Use this if the forward pass is your own. CuPy arrays in place of NumPy's run the same calls on a GPU.
"""

from itertools import pairwise

import numpy as np

import gpuback

rng = np.random.default_rng(0)
x = rng.standard_normal((256, 8), dtype=np.float32)
y = np.sin(x[:, :1]) * x[:, 1:2]
B = len(x)

sizes = [8, 32, 32, 1]
weights = [rng.normal(scale=n**-0.5, size=(n_out, n)).astype(np.float32) for n, n_out in pairwise(sizes)]
biases = [np.zeros(n, np.float32) for n in sizes[1:]]

for _ in range(400):
    h = [x]  # h[k] is layer k's output, with tanh between layers and none at the end
    for W, b in zip(weights[:-1], biases[:-1], strict=True):
        h.append(np.tanh(h[-1] @ W.T + b))
    prediction = h[-1] @ weights[-1].T + biases[-1]
    loss = ((prediction - y) ** 2).mean() / 2

    da = (prediction - y) / B  # ∂loss/∂a of the last layer
    for k in range(len(weights) - 1, -1, -1):
        below = {"activation_prev": "tanh"} if k > 0 else {"need_da_prev": False}
        dW, db, da_prev = gpuback.fused_backward(da, h[k], weights[k], **below)
        weights[k] -= 0.2 * dW
        biases[k] -= 0.2 * db
        da = da_prev

print(f"loss {loss:.4f}")
assert loss < 0.02
