"""What contestants are to each other."""

from typing import Literal

OURS = "gpuback"
"""The contestant that the others are compared with."""

Role = Literal["ours", "peer", "floor", "mode"]
"""gpuback; another library; the least that any of them has to do; gpuback with an option that costs time."""
