"""Train with differential privacy (DP-SGD): clip each sample's gradient, average, add noise.

Run: python docs/examples/per_sample.py
`value_and_clipped_grad` never materialises the per-sample gradients.
"""

import numpy as np

import gpuback

MAX_NORM, SIGMA, BATCH, STEPS = 1.0, 0.8, 256, 100

rng = np.random.default_rng(0)
x = rng.standard_normal((2000, 20))
y = (x @ rng.standard_normal(20) > 0).astype(int)

net = gpuback.MLP([20, 32, 2], activation="tanh", seed=0, backend="numpy")
optimizer = gpuback.SGD(0.5)

norms = net.gradient_norms(x, y)
print(f"norms of the samples' gradients: median {np.median(norms):.2f}, largest {norms.max():.2f}")

for _ in range(STEPS):
    batch = rng.permutation(len(x))[:BATCH]
    loss, gradients = net.value_and_clipped_grad(x[batch], y[batch], MAX_NORM)
    # One sample changes the sum of clipped gradients by at most MAX_NORM; the gradient is the mean over the batch.
    noise = rng.standard_normal(net.n_parameters)
    gradients.theta[...] += SIGMA * MAX_NORM / BATCH * noise
    optimizer.step(net, gradients)

accuracy = np.mean(net.forward(x).argmax(axis=1) == y)
print(f"accuracy {accuracy:.1%}")
assert accuracy > 0.9
