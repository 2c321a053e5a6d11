"""Train with a loss of your own: a Huber loss, whose gradient for ŷ you write down yourself.

Run: python docs/examples/custom_loop.py
gpuback's losses are a fixed list, but squared_error back-propagates any ∂L/∂ŷ: its gradient at the output is
(ŷ − y) / B, so the target y = ŷ − B ∂L/∂ŷ makes it ∂L/∂ŷ. This costs a second forward pass.
"""

import numpy as np

import gpuback

DELTA = 0.1


def huber(prediction: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean Huber loss and its gradient for the prediction."""
    error = prediction - target
    clipped = np.clip(error, -DELTA, DELTA)
    return float((clipped * (error - clipped / 2)).sum() / len(error)), clipped / len(error)


rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, (1000, 2))
y = np.sin(x[:, :1]) * x[:, 1:]
y[::20] += 30  # outliers, which would throw off a squared error

net = gpuback.MLP([2, 64, 1], activation="tanh", loss="squared_error", dtype="float64", seed=0, backend="numpy")
optimizer = gpuback.Adam(0.01)
gradients = None
for _ in range(400):
    prediction = net.forward(x)
    loss, slope = huber(prediction, y)
    _, gradients = net.value_and_grad(x, prediction - len(x) * slope, out=gradients)
    optimizer.step(net, gradients)

error = np.median(abs(net.forward(x) - y))
print(f"Huber loss {loss:.3f}, median error {error:.3f}")
assert error < 0.05
