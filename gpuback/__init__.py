"""gpuback: gradients of feed-forward networks by back-propagation, on NVIDIA GPUs and, just the same, on NumPy."""

# ruff: noqa: E402
from gpuback import _interrupted_start

_interrupted_start.guard()

from gpuback import losses as losses
from gpuback import schedules as schedules
from gpuback._backends.fused_backward import bind_fused_backward as bind_fused_backward
from gpuback._backends.fused_backward import fused_backward as fused_backward
from gpuback._backends.registry import BackendStatus as BackendStatus
from gpuback._backends.registry import backends as backends
from gpuback._core.expressions import CudaForms as CudaForms
from gpuback._core.own_activations import register_activation as register_activation
from gpuback._network.derivatives import Taylor as Taylor
from gpuback._network.gradient_check import GradientReport as GradientReport
from gpuback._network.gradient_check import check_gradients as check_gradients
from gpuback._network.mlp import MLP as MLP
from gpuback._network.mlp import Gradients as Gradients
from gpuback._network.vjp import Pullback as Pullback
from gpuback._network.vjp import SecondPullback as SecondPullback
from gpuback._training.fit import fit as fit
from gpuback._training.history import History as History
from gpuback._training.optimizers import SGD as SGD
from gpuback._training.optimizers import Adam as Adam
from gpuback._training.optimizers import AdamW as AdamW
from gpuback._training.train_step import LossScaling as LossScaling
from gpuback._training.train_step import TrainStep as TrainStep
from gpuback.errors import DivergedError as DivergedError
from gpuback.errors import GpubackError as GpubackError

__version__ = "0.1.0"
