"""Losses with options: `MLP(loss=gpuback.losses.Huber(delta=0.5))`. A name such as "huber" has the defaults.

`MLP(loss=…)` also takes a function of (ŷ, y) that returns the samples' losses and ∂ℓ/∂ŷ; see docs/own-loss.md.
"""

from gpuback._core.losses import AbsoluteError as AbsoluteError
from gpuback._core.losses import BinaryCrossEntropy as BinaryCrossEntropy
from gpuback._core.losses import CrossEntropy as CrossEntropy
from gpuback._core.losses import Huber as Huber
from gpuback._core.losses import Loss as Loss
from gpuback._core.losses import Poisson as Poisson
from gpuback._core.losses import Quantile as Quantile
from gpuback._core.losses import SquaredError as SquaredError
