"""How `TrainStep` and `fit` scale the loss of a float16 network from step to step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpuback._core.precision import Precision
from gpuback._core.validation import count, positive
from gpuback.errors import OptionError


@dataclass(frozen=True)
class LossScaling:
    """A dynamic loss scale, for float16: S times the loss goes back through the network; S then leaves the gradients.

    float16 holds nothing beyond 65504 and little below 10⁻⁷. The gradients of pre-activations are of order 1 whatever
    the batch size, by a fixed factor (docs/numerics.md); where a loss or a network makes them much larger or smaller,
    S brings them into range. It is a power of two. A step whose loss or gradient is not finite makes no update and
    halves S; after `growth_interval` steps in a row that made one, S is doubled. It stays within 2⁻²⁴ … 2²⁴. On a GPU
    nobody waits for any of this.

    Args:
        initial: S before the first step, a power of two.
        growth_interval: ≥ 1.

    Raises:
        OptionError: an argument is out of range.

    Source: Micikevicius et al., "Mixed precision training", 2018; torch.amp.GradScaler.
    """

    initial: float = 256.0
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        initial = positive("initial", self.initial)
        if np.frexp(initial)[0] != 0.5 or not 2.0**-24 <= initial <= 2.0**24:
            raise OptionError(f"initial: expected a power of two from 2⁻²⁴ to 2²⁴, got {self.initial!r}")
        count("growth_interval", self.growth_interval)

    def require(self, precision: Precision) -> None:
        """Raises OptionError unless it is of use to that precision."""
        if precision.operand != np.float16:
            raise OptionError(
                f"loss_scaling goes with dtype float16, whose range is small; {precision.name} needs none"
            )

    def options(self) -> dict[str, Any]:
        """As JSON can hold them."""
        return {name: float(value) for name, value in asdict(self).items()}
