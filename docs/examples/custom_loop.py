"""Write the training loop yourself, with a loss of your own: a function of ŷ and y.

Run: python docs/examples/custom_loop.py
The function returns each sample's loss and its gradient for ŷ. gpuback has this one built in, as losses.Huber(0.1).
"""

import numpy as np

import gpuback

DELTA = 0.1


def huber(prediction, target):
    """Return the samples' Huber losses (B,) and their gradients for the predictions, (B, 1)."""
    error = prediction - target
    clipped = np.clip(error, -DELTA, DELTA)
    return (clipped * (error - clipped / 2)).sum(axis=1), clipped


rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, (1000, 2))
y = np.sin(x[:, :1]) * x[:, 1:]
y[::20] += 30  # outliers, which would throw off a squared error

net = gpuback.MLP([2, 64, 1], activation="tanh", loss=huber, seed=0)
step = gpuback.TrainStep(net, gpuback.Adam(0.01))
for _ in range(40):
    order = rng.permutation(len(x))
    for rows in np.split(order, 10):
        loss = step(x[rows], y[rows])

error = np.median(abs(net.forward(x) - y))
print(f"loss of the last batch {float(loss):.3f}, median error {error:.3f}")
assert error < 0.05
