"""Every backend has the methods of gpuback/_backends/protocol.py, with its parameters; no GPU is needed to compare.

Types, and attributes that a protocol names as properties, are mypy's to compare.
"""

import inspect
from types import FunctionType
from typing import Any

import pytest
from support.exact_reference import NumpyExactBackend

from gpuback._backends import protocol
from gpuback._backends.cuda import updates as cuda_updates
from gpuback._backends.cuda.fused_network import CudaFusedNetwork
from gpuback._backends.cuda.gradient_scale import CudaGradientScale
from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.cuda.prefetch import CudaPrefetch
from gpuback._backends.cuda.updates import CudaLossScale
from gpuback._backends.cuda.workspace import CudaWorkspace
from gpuback._backends.exact.cuda_ops import CudaExactBackend, ReproducibleCudaBuffers, ReproducibleCudaOps
from gpuback._backends.exact.numpy_ops import ReproducibleNumpyOps, ReproducibleWorkspace
from gpuback._backends.exact.products import ExactBackend
from gpuback._backends.numpy import updates as numpy_updates
from gpuback._backends.numpy.gradient_scale import NumpyGradientScale
from gpuback._backends.numpy.ops import NumpyOps
from gpuback._backends.numpy.phases import NumpyPhases
from gpuback._backends.numpy.prefetch import NumpyPrefetch
from gpuback._backends.numpy.workspace import NumpyWorkspace
from gpuback._cuda.copy_stream import CudaCopyStream
from gpuback._cuda.device import CudaLauncher
from gpuback._cuda.launch import CopyStream

IMPLEMENTATIONS = {
    protocol.Ops: [NumpyOps, ReproducibleNumpyOps, CudaOps, ReproducibleCudaOps],
    protocol.Workspace: [NumpyWorkspace, ReproducibleWorkspace, CudaWorkspace, ReproducibleCudaBuffers],
    protocol.Update: [numpy_updates.SGDUpdate, numpy_updates.AdamUpdate],
    protocol.CapturableUpdate: [cuda_updates.SGDUpdate, cuda_updates.AdamUpdate],
    protocol.LossScale: [numpy_updates.NumpyLossScale, CudaLossScale],
    protocol.GradientScale: [NumpyGradientScale, CudaGradientScale],
    protocol.GraphCapture: [CudaLauncher],
    protocol.Prefetch: [NumpyPrefetch, CudaPrefetch],
    CopyStream: [CudaCopyStream],
    protocol.FusedNetwork: [CudaFusedNetwork, NumpyPhases],
    ExactBackend: [NumpyExactBackend, CudaExactBackend],
}

EXTRA = {
    (protocol.Ops, "padded"): "rows that start at 16 bytes, which only CUDA's asynchronous copies need",
    (protocol.Workspace, "scratch_like"): "within the NumPy backend",
    (protocol.Workspace, "c_ordered"): "within the NumPy backend",
    (protocol.Workspace, "bind_round"): "within the NumPy backend",
    (protocol.Workspace, "bind_product_operand"): "within the NumPy backend",
    (protocol.Update, "begin"): "an update in parts, which NumPy's passes in two phases make",
    (protocol.Update, "part"): "see begin",
    (protocol.Update, "end"): "see begin",
    (protocol.Update, "complete"): "see begin",
    (protocol.CapturableUpdate, "launch_step"): "the second half of an update, which a fused network launches",
    (protocol.CapturableUpdate, "write_hyper"): "the hyper-parameters on the device, which a fused network reads",
    (protocol.GraphCapture, "bind"): "of `Launcher`, which is the graph_capture",
    (protocol.GraphCapture, "address"): "of `Launcher`",
    (protocol.GraphCapture, "async_reader"): "of `Launcher`",
    (protocol.GraphCapture, "copy_stream"): "of `Launcher`",
}
"""Public methods that a protocol lacks, and who calls them: the backend itself."""

PAIRS = [(kind, one) for kind, several in IMPLEMENTATIONS.items() for one in several]


def methods(kind: type) -> dict[str, Any]:
    """Public methods, and __call__, by name."""
    return {
        name: member
        for name in dir(kind)
        if (not name.startswith("_") or name == "__call__")
        and isinstance(member := inspect.getattr_static(kind, name), (FunctionType, staticmethod))
    }


def parameters(member: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter, in order."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()]


@pytest.mark.parametrize(("kind", "one"), PAIRS, ids=lambda value: value.__name__)
def test_an_implementation_has_the_protocols_methods_and_parameters(kind: type, one: type) -> None:
    wanted, found = methods(kind), methods(one)
    for name, member in wanted.items():
        assert name in found, f"{one.__name__} has no method {name}"
        assert parameters(found[name]) == parameters(member), f"{one.__module__}.{one.__name__}.{name}"


@pytest.mark.parametrize(("kind", "one"), PAIRS, ids=lambda value: value.__name__)
def test_an_implementation_has_no_public_method_beside_those(kind: type, one: type) -> None:
    allowed = {*methods(kind), *(name for other, name in EXTRA if other is kind)}
    assert sorted(set(methods(one)) - allowed) == []


@pytest.mark.parametrize("kind", IMPLEMENTATIONS, ids=lambda kind: kind.__name__)
def test_every_method_of_a_protocol_says_what_it_does(kind: type) -> None:
    assert [name for name, member in methods(kind).items() if not inspect.getdoc(member)] == []


def test_exceptions_are_needed() -> None:
    for kind, name in EXTRA:
        assert any(name in methods(one) for one in IMPLEMENTATIONS[kind]), name
