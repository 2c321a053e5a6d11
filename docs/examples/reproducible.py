"""Train to the same bits on every machine, and prove it with a fingerprint.

Run: python docs/examples/reproducible.py
The fingerprint is the same on NumPy and on CUDA, with any BLAS and any number of threads.
"""

import numpy as np

import gpuback
from gpuback.testing import fingerprint

EXPECTED = "800975a4433daa64"

# Data from a stream that NumPy promises to keep, by sums of integers, which are exact
x = (np.random.PCG64(0).random_raw(400 * 16) % 33).reshape(400, 16) / 32
y = (x[:, :8].sum(axis=1) > x[:, 8:].sum(axis=1)).astype(int)


def trained() -> gpuback.MLP:
    """Train a small network."""
    net = gpuback.MLP([16, 32, 2], activation="tanh", reproducible=True, seed=0)
    gpuback.fit(net, x, y, epochs=5, optimizer=gpuback.Adam(0.01), batch_size=50, seed=0)
    return net


net = trained()
print(f"{net.backend}: {fingerprint(net)}")
assert fingerprint(net) == fingerprint(trained()) == EXPECTED

# Even the order of a batch's rows does not matter.
order = np.random.default_rng(0).permutation(len(x))
assert float(net.loss(x, y)) == float(net.loss(x[order], y[order]))
