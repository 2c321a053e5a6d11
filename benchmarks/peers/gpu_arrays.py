"""CuPy's arrays and PyTorch's tensors of one memory."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

try:
    import torch as torch
except ImportError:
    torch = None
if torch is not None and not torch.cuda.is_available():  # built for CPUs
    torch = None

DEVICE = "cuda"
"""PyTorch's name for the device of tensors."""


def synchronize() -> None:
    cupy.cuda.runtime.deviceSynchronize()


def as_tensor(array: Any) -> Any:
    """View a CuPy array's memory as a tensor of the same format."""
    if array.dtype.name == "bfloat16":
        return torch.as_tensor(array.view(np.int16), device=DEVICE).view(torch.bfloat16)
    return torch.as_tensor(array, device=DEVICE)


def as_array(tensor: Any) -> Any:
    """Convert a tensor to a CuPy array in float32."""
    return cupy.asarray(tensor.float().contiguous())
