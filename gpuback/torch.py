"""gpuback for PyTorch: `FusedMLP`, a module that runs gpuback's kernels, and networks turned into each other's."""

from __future__ import annotations

from gpuback.errors import missing_extra

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise missing_extra("PyTorch", "gpuback.torch", "torch") from error

from gpuback._torch.conversion import from_torch as from_torch
from gpuback._torch.conversion import to_torch as to_torch
from gpuback._torch.module import FusedMLP as FusedMLP
