"""Solve a differential equation with a network: the heat equation, by what it leaves over at random points.

Run: python docs/examples/heat_equation.py
Use this for losses with derivatives in them. docs/derivatives.md says what `taylor` computes.
"""

import numpy as np

import gpuback
from gpuback.schedules import cosine

STEPS, POINTS = 1000, 256
rng = np.random.default_rng(0)
net = gpuback.MLP([2, 32, 32, 1], activation="tanh", loss="squared_error", seed=0, backend="numpy")
optimizer, schedule = gpuback.Adam(), cosine(0.01, steps=STEPS)


def solution(q):
    """Of u_t = u_xx/π² with u = sin(πx) at t = 0 and u = 0 at x = ±1."""
    return np.exp(-q[:, :1]) * np.sin(np.pi * q[:, 1:])


for step in range(STEPS):
    inside = np.column_stack([rng.uniform(0, 1, POINTS), rng.uniform(-1, 1, POINTS)])  # (t, x)
    edge = inside[::2].copy()
    edge[::2, 0], edge[1::2, 1] = 0, np.sign(edge[1::2, 1])  # half at t = 0, half at x = ±1

    u = net.taylor(inside, second=[[0, 1 / np.pi**2]])  # first is (u_t, u_x), second is u_xx/π²
    residual = u.first[0] - u.second[0]
    slope = 2 * residual / POINTS  # of the mean of residual²
    gradients = u.pullback(first=np.stack([slope, 0 * slope]), second=[-slope])
    y, pullback = net.vjp(edge)
    pullback(20 * (y - solution(edge)) / len(edge), out=gradients, accumulate=True)
    optimizer.learning_rate = schedule(step)
    optimizer.step(net, gradients)

grid = np.stack(np.meshgrid(np.linspace(0, 1, 51), np.linspace(-1, 1, 101)), axis=-1).reshape(-1, 2)
error = np.linalg.norm(net.forward(grid) - solution(grid)) / np.linalg.norm(solution(grid))
print(f"relative error of u after {STEPS} steps: {error:.3f}")
assert error < 0.05
