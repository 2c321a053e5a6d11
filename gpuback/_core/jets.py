"""Jets: a batch's values with derivatives along directions, and weighted second derivatives, for layers.

A jet of B vectors is P = 1 + D + S planes (P, B, n): plane 0 the values, planes 1 … D the derivatives along D
directions, then S planes Σ_d C_sd ∂²/∂v_d².

Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994; Li et al., "Forward Laplacian", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Jet:
    """Which planes a jet has.

    Attributes:
        directions: D.
        seconds: C, for each of S planes the weights of the D directions' second derivatives.
        moving: whether θ moves along the direction too: D = 1, S = 0.
    """

    directions: int = 0
    seconds: tuple[tuple[float, ...], ...] = ()
    moving: bool = False

    @property
    def planes(self) -> int:
        """P."""
        return 1 + self.directions + len(self.seconds)

    @property
    def straight_planes(self) -> int:
        """How many planes are not second derivatives; x has no others."""
        return 1 + self.directions

    @property
    def order(self) -> int:
        """The order of the highest derivative: 0, 1 or 2."""
        return 2 if self.seconds else min(self.directions, 1)
