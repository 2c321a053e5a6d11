"""Learn a curve's signed distance from points on it: f = 0 there, and |∇f| = 1 everywhere (the eikonal equation).

Run: python docs/examples/signed_distance.py
Use this for losses with the network's own gradient in them: differentiate the way back.
"""

import numpy as np

import gpuback
from gpuback.schedules import cosine

STEPS, N = 600, 128
rng = np.random.default_rng(0)
net = gpuback.MLP([2, 64, 64, 1], activation="silu", loss="squared_error", seed=0, backend="numpy")
optimizer, schedule = gpuback.Adam(), cosine(0.004, steps=STEPS)


def ellipse(n):
    """Draw points and normals."""
    angle = rng.uniform(0, 2 * np.pi, n)
    normals = np.column_stack([0.4 * np.cos(angle), 0.7 * np.sin(angle)])
    points = np.column_stack([0.7 * np.cos(angle), 0.4 * np.sin(angle)])
    return points, normals / np.linalg.norm(normals, axis=1, keepdims=True)


for step in range(STEPS):
    points, normals = ellipse(N)
    x = np.concatenate([points, rng.uniform(-1, 1, (2 * N, 2))])
    f, pullback = net.vjp(x)
    first, second = pullback.vjp(np.ones_like(f))  # first.inputs is ∇f
    size = np.linalg.norm(first.inputs, axis=1, keepdims=True)
    by_gradient = 0.2 * (1 - 1 / size) * first.inputs / len(x)  # of 0.1 mean (|∇f| − 1)²
    by_gradient[:N] += 0.2 * (first.inputs[:N] - normals) / N  # of 0.1 mean |∇f − normal|² on the curve
    by_f = np.where(np.arange(len(f))[:, None] < N, 2 * f / N, 0)  # of mean f² on the curve
    optimizer.learning_rate = schedule(step)
    optimizer.step(net, second(inputs=by_gradient, outputs=by_f))

on_curve, median = np.abs(net.forward(ellipse(1000)[0])).mean(), np.median(size)
print(f"after {STEPS} steps: |f| on the curve {on_curve:.4f}, median |∇f| {median:.3f}")
assert max(on_curve, abs(median - 1)) < 0.03
