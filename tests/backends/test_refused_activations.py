"""An activation without a kernel: the CUDA backend refuses it by name wherever it is bound, and computes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.requirements import require_emulator

import gpuback
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.losses import LOSSES
from gpuback._core.precision import Precision
from gpuback.errors import OptionError

require_emulator()

SWOOSH = replace(ACTIVATIONS["tanh"], name="swoosh", kernel_id=None)
FLOAT32 = Precision.of("float32")
ROWS, WIDTH = 5, 4


def array(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def forward(ops: Any, workspace: Any) -> None:
    ops.bind_forward(array(3, WIDTH), array(3), array(ROWS, 3), None, SWOOSH, workspace)


def backward(ops: Any, workspace: Any) -> None:
    da, W, da_prev, source = array(ROWS, 3), array(3, WIDTH), array(ROWS, WIDTH), array(ROWS, WIDTH)
    ops.bind_backward(da, W, da_prev, SWOOSH, source, 1.0, workspace)


def delta(ops: Any, workspace: Any) -> None:
    da, W, da_prev, source = array(ROWS, 3), array(3, WIDTH), array(ROWS, WIDTH), array(ROWS, WIDTH)
    ops.bind_delta(da, W, da_prev, SWOOSH, source, 1.0, workspace)


def output(ops: Any, workspace: Any) -> None:
    ops.bind_output("swoosh", array(ROWS, 3), workspace)


def loss(ops: Any, workspace: Any) -> None:
    ops.bind_loss(LOSSES["squared_error"], "swoosh", array(ROWS, 3), array(ROWS, 3), 1.0, workspace)


def layer_backward(ops: Any, workspace: Any) -> None:
    da, h_prev, W = array(ROWS, 3), array(ROWS, WIDTH), array(3, WIDTH)
    dW, db, da_prev = array(3, WIDTH), array(3), array(ROWS, WIDTH)
    ops.bind_layer_backward(da, WIDTH, SWOOSH, FLOAT32)(da, h_prev, W, h_prev, dW, db, da_prev, False)


@pytest.fixture
def swoosh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "swoosh", SWOOSH)


@pytest.mark.parametrize("bind", [forward, backward, delta, output, loss, layer_backward])
def test_binding_it_on_cuda_is_refused(bind: Callable[[Any, Any], None], swoosh: None) -> None:
    from support.emulated import emulated_ops

    ops = emulated_ops()
    with pytest.raises(OptionError, match="'swoosh' has no CUDA form"):
        bind(ops, ops.workspace(ROWS, (WIDTH, 3), FLOAT32))


@pytest.mark.on_each_backend(layers=True)
def test_a_network_with_it_is_refused(swoosh: None, request: pytest.FixtureRequest) -> None:
    net, x = gpuback.MLP([4, 6, 3], activation="swoosh", seed=0), np.ones((ROWS, 4))
    if net.backend == "numpy":
        assert np.isfinite(net.forward(x)).all()
        return
    with pytest.raises(
        OptionError, match=re.escape("activation 'swoosh' has no CUDA form: expected one with cuda=gpuback.CudaForms")
    ):
        net.forward(x)
    with pytest.raises(OptionError, match="swoosh"):
        net.value_and_grad(x, np.zeros(ROWS, int))
