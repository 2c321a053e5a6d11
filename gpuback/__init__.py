"""gpuback: gradients of feed-forward networks by back-propagation, on NVIDIA GPUs and, just the same, on NumPy."""

from gpuback import schedules as schedules
from gpuback.errors import DivergedError as DivergedError
from gpuback.errors import GpubackError as GpubackError
from gpuback.gradient_check import GradientReport as GradientReport
from gpuback.gradient_check import check_gradients as check_gradients
from gpuback.history import History as History
from gpuback.loss_scaling import LossScaling as LossScaling
from gpuback.network import MLP as MLP
from gpuback.network import Gradients as Gradients
from gpuback.ops import BackendStatus as BackendStatus
from gpuback.ops import backends as backends
from gpuback.ops import fused_backward as fused_backward
from gpuback.optimizers import SGD as SGD
from gpuback.optimizers import Adam as Adam
from gpuback.optimizers import AdamW as AdamW
from gpuback.train_step import TrainStep as TrainStep
from gpuback.training import fit as fit

__version__ = "0.1.0"
