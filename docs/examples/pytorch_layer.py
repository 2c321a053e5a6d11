"""Use gpuback's kernels as a layer of a PyTorch model, under PyTorch's optimizer.

Run: python docs/examples/pytorch_layer.py
Needs the extra "torch": pip install '.[torch]' in the source tree.
"""

import torch
from torch import nn

from gpuback.torch import FusedMLP, from_torch, to_torch

torch.manual_seed(0)
x = torch.randn(1000, 4)
y = (x[:, 0] * x[:, 1] > 0).long()

model = nn.Sequential(nn.BatchNorm1d(4), FusedMLP([4, 32, 32, 2], activation="gelu", seed=0))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()

accuracy = (model(x).argmax(dim=1) == y).float().mean()
print(f"loss {loss:.3f}, accuracy {accuracy:.1%}")
assert accuracy > 0.95

# The module becomes plain PyTorch layers, or a gpuback network.
model.eval()
inputs = model[0](x).detach()
assert torch.allclose(to_torch(model[1])(inputs), model[1](inputs), atol=1e-5)
print(from_torch(model[1], loss="cross_entropy"))
