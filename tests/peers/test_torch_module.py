"""`FusedMLP` beside the `nn.Sequential` that it replaces: results, gradients, training, and PyTorch's ways of use."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.requirements import require_emulator, require_gpu
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gpuback._backends.cuda.ops import CudaOps
from gpuback._backends.numpy.ops import NumpyOps
from gpuback._core.activations import ACTIVATIONS as TABLE
from gpuback._core.threads import ThreadPool
from gpuback._network.pool import KEPT_BUFFERS
from gpuback._torch import devices, passes
from gpuback._torch.conversion import MODULES
from gpuback.errors import ConversionError, DeviceError, DtypeError, MissingExtraError, OptionError, ShapeError
from gpuback.torch import FusedMLP, to_torch

ACTIVATIONS = [name for name in TABLE if name in MODULES]
OUTPUTS = ["identity", "softmax", "sigmoid", "tanh"]
SIZES = [6, 9, 7, 5]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fused(sizes: list[int] = SIZES, **options: Any) -> FusedMLP:
    """A network with biases other than 0."""
    net = FusedMLP(sizes, **{"dtype": "float64", "activation": "tanh", "seed": 0} | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def gradients(net: nn.Module, loss: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [x, *net.parameters()]))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-13) -> None:
    """To so much of the largest element: sums that cancel keep the rounding of their terms."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def batch(shape: tuple[int, ...] = (11,), width: int = SIZES[0], dtype: Any = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, width, dtype=dtype, requires_grad=True)


# --- the same function


@each_activation
@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_and_gradients_are_those_of_the_sequential(activation: str, output: str) -> None:
    net = fused(activation=activation, output=output)
    twin, x = to_torch(net), batch((3, 4))
    y, expected = net(x), twin(x)
    assert_close(y, expected)
    upstream = torch.randn_like(y)
    for own, theirs in zip(
        gradients(net, (y * upstream).sum(), x), gradients(twin, (expected * upstream).sum(), x), strict=True
    ):
        # hardsigmoid's gradient has float32's 1/6 in float64, too
        assert_close(own, theirs, 1e-6 if activation == "hard_sigmoid" else 1e-12)


@pytest.mark.parametrize("sizes", [[6, 5], [6, 1], [1, 1, 1], [6, 3, 40]], ids=str)
def test_networks_of_other_shapes(sizes: list[int]) -> None:
    net, x = fused(sizes), batch((7,), sizes[0])
    twin = to_torch(net)
    assert_close(net(x), twin(x))
    for own, theirs in zip(
        gradients(net, net(x).square().sum(), x), gradients(twin, twin(x).square().sum(), x), strict=True
    ):
        assert_close(own, theirs, 1e-12)


@pytest.mark.parametrize("activation", TABLE)
def test_finite_differences(activation: str) -> None:
    net, x = fused(activation=activation), batch((4,))
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, *net.parameters()))


@each_activation
def test_float32_is_as_close_to_float64_as_pytorchs(activation: str) -> None:
    net = fused([30, 64, 50, 10], dtype="float32", activation=activation)
    twin, exact, x = to_torch(net), to_torch(net).double(), batch((300,), 30)

    def found(network: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        rows = x.detach().to(torch.float32).to(dtype).requires_grad_()
        y = network(rows)
        return [y.detach().double(), *(g.double() for g in gradients(network, y.square().mean(), rows))]

    expected = found(exact, torch.float64)
    for own, theirs, true in zip(found(net, torch.float32), found(twin, torch.float32), expected, strict=True):
        # Their BLAS libraries cut sums in different pieces, which is worth a factor of 2.
        assert (own - true).norm() <= 3 * (theirs - true).norm() + 1e-7 * true.norm()


# --- training


@pytest.mark.parametrize(
    "optimizer, options", [(torch.optim.Adam, {"lr": 0.01}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})]
)
def test_a_hundred_steps_of_training_overlap(optimizer: Any, options: dict[str, Any]) -> None:
    def curve(net: nn.Module, dtype: torch.dtype) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(64, 6, generator=generator).to(dtype), torch.randint(5, (64,), generator=generator)
        steps, losses = optimizer(net.parameters(), **options), []
        for _ in range(100):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            steps.step()
            losses.append(loss.item())
        return np.array(losses)

    net = fused(dtype="float32")
    twin, exact, same = to_torch(net), to_torch(net).double(), copy.deepcopy(net).double()
    expected = curve(exact, torch.float64)
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(curve(same, torch.float64), expected, rtol=1e-11)
    own, theirs = (np.abs(curve(network, torch.float32) - expected) for network in (net, twin))
    assert own.max() <= 3 * theirs.max() + 3e-7 * expected.max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_with_16_bit_operands_follows_float32(dtype: str) -> None:
    def last(net: nn.Module) -> float:
        x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5
        steps = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(60):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            steps.step()
        return loss.item()

    assert last(fused(dtype=dtype)) == pytest.approx(last(fused(dtype="float32")), rel=0.05)


# --- calls in any order


def test_every_call_keeps_what_its_backward_pass_needs() -> None:
    net = fused(activation="gelu")
    twin, inputs = to_torch(net), [batch() for _ in range(7)]
    outputs = [net(x) for x in inputs]
    with torch.no_grad():
        net(inputs[0])
    for x, y in list(zip(inputs, outputs, strict=True))[::-1]:
        for own, theirs in zip(
            gradients(net, y.square().sum(), x), gradients(twin, twin(x).square().sum(), x), strict=True
        ):
            assert_close(own, theirs, 1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_large_batches_go_through_in_blocks(threads: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 103 rows in blocks of 10, in up to 8 tasks."""
    net, x = fused(dtype=dtype, activation="gelu"), batch((103,))
    expected = [net(x).detach(), *gradients(net, net(x).square().sum(), x)]
    net._pool.clear()
    monkeypatch.setattr(NumpyOps, "plan_blocks", lambda *_, **__: (10, ThreadPool(threads, blas_alone=False)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    y, _ = net(x), net(2 * x)
    with torch.no_grad():
        assert torch.equal(net(x), y)
    found = [y.detach(), *gradients(net, y.square().sum(), x)]
    for own, true in zip(found, expected, strict=True):
        assert_close(own, true, {"float64": 1e-14, "float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype])
    again = [net(x).detach(), *gradients(net, net(x).square().sum(), x)]
    assert all(torch.equal(own, same) for own, same in zip(again, found, strict=True))


def test_one_module_twice_in_one_graph() -> None:
    net = fused([6, 8, 6])
    twin, x = to_torch(net), batch()
    for own, theirs in zip(gradients(net, net(net(x)).sum(), x), gradients(twin, twin(twin(x)).sum(), x), strict=True):
        assert_close(own, theirs, 1e-12)


def test_a_retained_graph_gives_the_same_bits_again() -> None:
    net, x = fused(), batch()
    y = net(x).square().sum()
    first = torch.autograd.grad(y, [x, *net.parameters()], retain_graph=True)
    net(batch()).sum().backward()
    again = torch.autograd.grad(y, [x, *net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x)


def test_gradients_accumulate() -> None:
    net, x = fused(), batch()
    net(x).sum().backward()
    once = [parameter.grad.clone() for parameter in net.parameters()]
    net(x).sum().backward()
    for parameter, grad in zip(net.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad)


def test_several_threads_share_a_module() -> None:
    net = fused([6, 64, 5])
    inputs = [batch((200,)) for _ in range(4)]
    expected = [gradients(net, net(x).square().sum(), x) for x in inputs]
    found: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        for _ in range(20):
            found[index] = gradients(net, net(inputs[index]).square().sum(), inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(own, true) for index in range(4) for own, true in zip(found[index], expected[index], strict=True)
    )


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = passes.ModulePasses.__init__

    def counted(self: Any, key: Any, architecture: Any, parameters: Any, ops: Any, rows: int, *needs: bool) -> None:
        made.append(rows)
        make(self, key, architecture, parameters, ops, rows, *needs)

    monkeypatch.setattr(passes.ModulePasses, "__init__", counted)
    net = fused()
    steps = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        for rows in (7, 3):
            net(batch((rows,))).sum().backward()
            steps.step()
    assert made == [7, 3]
    blocks = [block for kept in net._pool._free for block in kept.held._blocks.values()]
    assert all(block.h_0 is None for block in blocks)  # the batch itself is not kept


def test_buffers_kept_are_few() -> None:
    net = fused()
    for rows in range(1, 20):
        net(batch((rows,))).sum().backward()
    assert len(net._pool._free) <= KEPT_BUFFERS


@pytest.mark.parametrize("which", ["x", "a weight"])
def test_what_was_changed_before_backward_is_noticed(which: str) -> None:
    net, x = fused(), batch()
    y = net(x)
    with torch.no_grad():
        (x if which == "x" else net.get_parameter("2.weight")).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


HOOKS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "to NumPy": lambda: saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy),
    "save_on_cpu": save_on_cpu,
    "mutation": allow_mutation_on_saved_tensors,
}


def changed_before_backward(
    net: nn.Module, x: torch.Tensor, hooks: str, change: str, frozen: Sequence[str]
) -> list[torch.Tensor | None] | None:
    """The gradients, after x or parameters were written to; None if PyTorch refuses that."""
    x, named = x.detach().clone().requires_grad_("x" not in frozen), dict(net.named_parameters())
    for name in frozen:
        if name != "x":
            named[name].requires_grad_(False)
    with HOOKS[hooks]():
        h = x * 1.0
        y = net(h)
        with torch.no_grad():
            for name in ("x", *named) if change == "all" else (change,):
                (h if name == "x" else named[name]).add_(1)
        try:
            y.square().sum().backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None
    return [x.grad, *(parameter.grad for parameter in named.values())]


@pytest.mark.parametrize("rows", [5, 3000])
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("change", ["x", "0.weight", "2.weight", "4.bias", "all"])
def test_what_changes_before_backward_does_what_it_does_to_the_sequential(rows: int, hooks: str, change: str) -> None:
    """Right gradients where hooks keep what was saved; else PyTorch's error, if the backward pass would read it."""
    for frozen in (
        (),
        ("x",),
        ("0.weight",),
        ("0.weight", "0.bias", "2.weight", "2.bias"),
        ("x", "0.weight", "0.bias"),
    ):
        net, x = fused(), batch((rows,))
        twin = to_torch(net)
        found, expected = (changed_before_backward(each, x, hooks, change, frozen) for each in (net, twin))
        assert (found is None) == (expected is None), frozen
        for own, true in zip(found or (), expected or (), strict=True):
            assert (own is None) == (true is None)
            if own is not None:
                assert_close(own, true, 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hooks_change_no_bit(dtype: str) -> None:
    net, x = fused(dtype=dtype, activation="gelu"), batch((300,), dtype=torch.float32)
    expected = gradients(net, net(x).square().sum(), x)
    with HOOKS["to NumPy"]():
        y = net(x)
    for _ in range(2):
        found = torch.autograd.grad(y.square().sum(), [x, *net.parameters()], retain_graph=True)
        assert all(torch.equal(own, true) for own, true in zip(found, expected, strict=True))
    assert all(map(torch.equal, gradients(net, net(x).square().sum(), x), expected))  # and later calls none


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpoint(reentrant: bool) -> None:
    net, x = fused(), batch()
    expected = gradients(net, net(2 * x).square().sum(), x)
    checkpoint(lambda x: net(2 * x).square().sum(), x, use_reentrant=reentrant).backward()
    assert all(map(torch.equal, [x.grad, *(parameter.grad for parameter in net.parameters())], expected))


def test_a_hook_unpacks_once_and_what_it_returns_must_fit() -> None:
    net, x, unpacked = fused(), batch(), []
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: unpacked.append(t) or t):
        y = net(x).square().sum()
    unpacked.clear()
    torch.autograd.grad(y, x, create_graph=True)
    assert sorted(len(t) for t in unpacked) == sorted([11, 11, 9, 7, 5])  # ŷ for its square, x, W_1, W_2, W_3
    with saved_tensors_hooks(lambda t: t, lambda t: t[:1].clone() if t.shape == (7, 9) else t):
        y = net(x)
    with pytest.raises(ShapeError, match=r"saved tensor of shape \(7, 9\) from its hook, got \(1, 9\)"):
        y.sum().backward()


def test_gradients_of_gradients_are_refused() -> None:
    """Also where ∂loss/∂ŷ is a constant, so that PyTorch would take them for constants."""
    net, x = fused(), batch()
    for loss in (net(x).square().sum(), net(x).sum()):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no gradients of gradients; gpuback.torch.to_torch"):
            (loss + dx.square().sum()).backward()
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.functional.hvp(lambda x: net(x).sum(), x, torch.ones_like(x))


def test_threads_may_go_back_through_one_graph() -> None:
    net, x = fused([20, 200, 100, 3], dtype="float64"), torch.randn(300, 20, dtype=torch.float64, requires_grad=True)
    loss, parameters = net(x).square().sum(), [x, *net.parameters()]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)

    def go_back(_: int) -> bool:
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        return all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(go_back, range(30)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused(frozen: bool) -> None:
    net, x = fused(), batch().detach()
    with torch.set_grad_enabled(not frozen), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            net(dual)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_tracing_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"cannot be traced; expected plain modules: gpuback.torch.to_torch"):
        torch.jit.trace(fused(), (batch().detach(),), check_trace=False)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("0.weight", (9, 3), "0.weight: expected shape (4, 3) for sizes (3, 4, 2), got (9, 3)"),
        ("0.bias", (1,), "0.bias: expected shape (4,) for sizes (3, 4, 2), got (1,)"),
        ("2.weight", (2, 4, 1), "2.weight: expected shape (2, 4) for sizes (3, 4, 2), got (2, 4, 1)"),
        ("2.bias", None, "2.bias: expected shape (2,) for sizes (3, 4, 2), got None"),
    ],
)
def test_parameters_of_other_shapes_are_refused(name: str, shape: Any, message: str) -> None:
    net = FusedMLP([3, 4, 2], seed=0)
    part = None if shape is None else torch.nn.Parameter(torch.ones(shape))
    setattr(net.get_submodule(name[0]), name[2:], part)
    with pytest.raises(ShapeError, match=re.escape(message)):
        net(torch.ones(5, 3))


# --- with and without gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_gradients(mode: Any, dtype: str) -> None:
    net, x = fused(dtype=dtype), batch()
    with mode():
        y = net(x)
    assert not y.requires_grad
    assert torch.equal(y, net(x).detach())
    with torch.no_grad():
        assert torch.equal(y, net(x))


def test_frozen_parameters_get_no_gradient() -> None:
    net, x = fused(), batch()
    net.get_submodule("0").requires_grad_(False)
    net(x).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == ["0.weight", "0.bias"]
    net.requires_grad_(False)
    assert_close(torch.autograd.grad(net(x).sum(), x)[0], x.grad)
    assert not net(x.detach()).requires_grad


def test_train_and_eval_are_the_same() -> None:
    net, x = fused(), batch()
    assert torch.equal(net.train()(x), net.eval()(x))


# --- parameters


def test_state_goes_to_the_sequential_and_back() -> None:
    net = fused(dtype="float32")
    twin = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))
    other = FusedMLP(SIZES, activation="tanh")
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(twin.state_dict())
    assert list(net.state_dict()) == list(twin.state_dict())
    x = torch.randn(11, 6)
    assert_close(net(x), twin(x), 1e-6)
    assert torch.equal(net(x), other(x))


def test_a_seed_means_the_same_weights_as_in_gpuback() -> None:
    import gpuback

    net = FusedMLP(SIZES, seed=3)
    theta = gpuback.MLP(SIZES, loss="squared_error", backend="numpy", seed=3).theta
    assert np.array_equal(nn.utils.parameters_to_vector(net.parameters()).detach().numpy(), theta)


def test_pytorchs_seed_counts_where_none_is_given() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(FusedMLP(SIZES).get_parameter("0.weight"))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_copies_are_independent() -> None:
    net, x = fused(), batch()
    net(x).sum().backward()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        with torch.no_grad():
            twin.get_parameter("0.weight").zero_()
        assert not torch.equal(twin(x), net(x))


def test_parameters_are_read_where_they_are_and_when_they_are_needed() -> None:
    net, x = fused(), batch()
    net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.get_parameter("4.bias")[2] = 7
    assert net(x).tolist() == [[0, 0, 7, 0, 0]] * 11
    net.get_submodule("4").bias = nn.Parameter(torch.ones(5, dtype=torch.float64))
    assert net(x).tolist() == [[1] * 5] * 11


def test_parameters_in_any_layout() -> None:
    net, x = fused(), batch()
    expected = net(x)
    layer = net.get_submodule("2")
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not layer.weight.is_contiguous()
    assert_close(net(x), expected)
    net(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def test_parametrizations_are_respected() -> None:
    net = fused()
    nn.utils.parametrizations.weight_norm(net.get_submodule("2"))
    x, twin = batch(), to_torch(fused())
    nn.utils.parametrizations.weight_norm(twin[2])
    twin.load_state_dict(net.state_dict())
    for own, theirs in zip(gradients(net, net(x).sum(), x), gradients(twin, twin(x).sum(), x), strict=True):
        assert_close(own, theirs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    net, x = fused(dtype="float32"), batch()
    expected = to_torch(net).double()
    net(x)
    net.to(dtype)
    assert not net._pool._free  # buffers over the old parameters
    y = net(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in net.parameters()} == {dtype}
    step = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    assert_close(y.double(), expected(x), step)
    own, expected_gradients = net.get_parameter("0.weight").grad, gradients(expected, expected(x).sum(), x)
    assert_close(own.double(), expected_gradients[1], 2 * step)


# --- 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_16_bit_operands_with_sums_in_32(dtype: torch.dtype) -> None:
    net = fused(dtype="float32")
    same = FusedMLP(SIZES, activation="tanh", dtype=dtype)
    same.load_state_dict(net.state_dict())
    x = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = net(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, same(x))
    assert not torch.equal(y, net(x))
    for own, theirs in zip(gradients(net, y.sum(), x), gradients(same, same(x).sum(), x), strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, theirs)


def test_autocast_leaves_float64_alone_and_goes_on_with_other_layers() -> None:
    net, x = fused(), batch()
    expected = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x), expected)
        chain = nn.Sequential(nn.Linear(6, 6), fused(dtype="float32"), nn.Linear(5, 2))
        y = chain(x.float())
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in chain.parameters())


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_float16_carries_gradients_of_any_size(size: float) -> None:
    """In float16 itself 1e-12 is 0 and 1e6 infinite."""
    net, x = fused(dtype="float16"), batch((500,), dtype=torch.float32)
    ones, others = gradients(net, net(x).sum(), x), gradients(net, (net(x) * size).sum(), x)
    for one, other in zip(ones, others, strict=True):
        assert_close(other.double() / size, one.double(), 4e-3)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_float16_with_gradients_of_zero_or_not_finite(value: float) -> None:
    net, x = fused(dtype="float16"), batch(dtype=torch.float32)
    (dx,) = torch.autograd.grad(net(x), x, torch.full((11, 5), value))
    assert not dx.any() if value == 0 else not dx.isfinite().any()


# --- what goes in


def test_any_number_of_axes_as_linear_takes_them() -> None:
    net = fused()
    twin = to_torch(net)
    for shape in ((), (1,), (3, 1, 2)):
        x = batch(shape)
        assert_close(net(x), twin(x))
        assert_close(torch.autograd.grad(net(x).sum(), x)[0], torch.autograd.grad(twin(x).sum(), x)[0])


def test_other_modules_may_live_in_it() -> None:
    net, x = fused(), batch()
    expected = net(x)
    net.other = nn.Linear(2, 2)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_no_samples_are_what_linear_makes_of_them(shape: tuple[int, ...]) -> None:
    net, x = fused(), batch(shape)
    y = net(x)
    assert y.shape == (*shape, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(11, 6),
        lambda x: torch.complex(x, -x).conj().imag,
        lambda x: x.float(),
        lambda x: (10 * x).int(),
    ],
    ids=["transposed", "expanded", "negated lazily", "float32", "integers"],
)
def test_tensors_of_any_layout_and_dtype(change: Any) -> None:
    net, x = fused(), change(batch().detach())
    assert_close(net(x), to_torch(net)(torch.tensor(x.tolist(), dtype=torch.float64)))


def test_one_number_that_is_negated_lazily() -> None:
    net, x = fused([1, 1]), torch.tensor([[1 + 2j]], dtype=torch.complex128).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    assert torch.equal(net(x), net(torch.tensor([[-2.0]])))


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.ones(3, 5), ShapeError, r"x: expected shape \(…, 6\) .*got \(3, 5\)"),
        (torch.tensor(1.0), ShapeError, r"got \(\)"),
        (torch.ones(3, 6, dtype=torch.complex64), DtypeError, "x: expected real numbers"),
        (torch.ones(3, 6, device="meta"), DeviceError, "x: expected a tensor on cpu.*got one on meta"),
    ],
)
def test_tensors_that_do_not_fit(x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused()(x)


def test_parameters_that_do_not_fit_each_other() -> None:
    net = fused()
    net.get_submodule("2").half()
    with pytest.raises(DtypeError, match=r"one dtype, got torch.float64 and torch.float16"):
        net(batch())
    net.get_submodule("2").to("meta", torch.float64)
    with pytest.raises(DeviceError, match="one device, got cpu and meta"):
        net(batch())


def test_devices_without_kernels() -> None:
    net = FusedMLP(SIZES, device="meta")
    with pytest.raises(DeviceError, match="CPU or an NVIDIA GPU, got them on 'meta'"):
        net(torch.ones(2, 6, device="meta"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"activation": "swish"}, OptionError, "unknown activation"),
        ({"output": "relu"}, OptionError, "unknown output"),
        ({"dtype": torch.int8}, DtypeError, "got torch.int8"),
        ({"dtype": "float16", "allow_tf32": True}, OptionError, "allow_tf32"),
        ({"activation": ["relu"]}, ShapeError, "activation"),
        ({"seed": -1}, OptionError, "seed: expected an integer"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedMLP(SIZES, **options)


def test_torch_compile_calls_it_as_it_is() -> None:
    net, x = fused(), batch()
    compiled = torch.compile(nn.Sequential(nn.Tanh(), net), backend="eager")
    assert torch.equal(compiled(x), net(torch.tanh(x)))
    compiled(x).sum().backward()


# --- memory


def test_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    bind_forward, bind_backward = NumpyOps.bind_forward, NumpyOps.bind_backward

    def forward_seen(self: Any, W: Any, b: Any, *rest: Any) -> Any:
        seen.extend([W, b])
        run = bind_forward(self, W, b, *rest)
        return lambda h: (seen.append(h), run(h))

    def backward_seen(*arguments: Any) -> Any:
        run = bind_backward(*arguments)
        return lambda h, dW, db, accumulate: (seen.extend([dW, db]), run(h, dW, db, accumulate))

    monkeypatch.setattr(NumpyOps, "bind_forward", forward_seen)
    monkeypatch.setattr(NumpyOps, "bind_backward", backward_seen)
    net, x = fused(), batch()
    net(x).sum().backward()
    addresses = {array.ctypes.data for array in seen}
    assert addresses >= {tensor.data_ptr() for tensor in [x, *net.parameters()]}
    assert addresses >= {parameter.grad.data_ptr() for parameter in net.parameters()}


# --- the CUDA backend: its kernels run in the emulator, streams are stand-ins; there is no GPU here


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_cuda_backend_gives_the_same_numbers(dtype: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_emulator()
    from emulator import EmulatorLauncher

    net, x = fused(dtype=dtype, activation=activation), batch((3, 7))
    y, twin = net(x), net(2 * x)  # in buffers of their own
    expected = [y.detach(), *gradients(net, y.square().sum(), x), *gradients(net, twin.sum(), x)]
    net._pool.clear()
    ops = CudaOps(np, EmulatorLauncher("random", copies="random", resident_blocks=3), name="emulated")
    monkeypatch.setattr(devices, "ops_on", lambda kind, index: ops)
    y, twin = net(x), net(2 * x)
    found = [y.detach(), *gradients(net, y.square().sum(), x), *gradients(net, twin.sum(), x)]
    net._pool.clear()  # of NumPy's buffers, which the first graphs have given back
    with HOOKS["to NumPy"]():
        y = net(x)
    assert all(map(torch.equal, gradients(net, y.square().sum(), x), found[1:]))
    step = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2**-6, "float16": 2**-9}[dtype]
    for own, true in zip(found, expected, strict=True):
        assert_close(own, true, step)


def test_work_goes_to_pytorchs_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device, events = torch.device("cuda", 1), []

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        events.append(name)
        yield
        events.append(f"end of {name}")

    def from_external(stream: Any) -> Any:
        version, address = stream.__cuda_stream__()
        return entered(f"stream {version}, {address}")

    cupy = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=lambda index: entered(f"device {index}"), Stream=SimpleNamespace(from_external=from_external)
        )
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda of: entered(f"PyTorch's {of}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: SimpleNamespace(cuda_stream=4711 + of.index))
    monkeypatch.setattr(
        devices, "ops_on", lambda kind, index: SimpleNamespace(scope=lambda: entered(f"{kind} {index}"))
    )
    with devices.on_stream_of(device):
        events.append("work")
    assert events[:5] == ["cuda 1", "PyTorch's cuda:1", "device 1", "stream 0, 4712", "work"]
    assert len(events) == 9
    assert devices.stream_of(device) == 4712
    assert devices.stream_of(torch.device("cpu")) == 0


def test_everything_is_made_and_run_on_that_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen = [False], []

    @contextmanager
    def stream(device: torch.device) -> Iterator[None]:
        inside[0] = True
        with np.errstate(all="ignore"):
            yield
        inside[0] = False

    def watched(name: str) -> None:
        plain = getattr(passes.ModulePasses, name)

        def seen_to_run(*arguments: Any) -> Any:
            seen.append((name, inside[0]))
            return plain(*arguments)

        monkeypatch.setattr(passes.ModulePasses, name, seen_to_run)

    monkeypatch.setattr(devices, "on_stream_of", stream)
    for name in ("__init__", "forward", "backward"):
        watched(name)
    net, x = fused(dtype="bfloat16"), batch()
    net(x).sum().backward()
    with torch.no_grad():
        net(x)
    assert all(on_stream for _, on_stream in seen)
    assert [name for name, _ in seen] == ["__init__", "forward", "backward", "__init__", "forward"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_on_a_gpu_beside_pytorchs_own_work(dtype: str) -> None:
    require_gpu()
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    net, x = fused([60, 90, 70, 50], dtype=dtype, activation="gelu").cuda(), batch((333,), 60).cuda()
    exact, optimizer = to_torch(net).double(), torch.optim.SGD(net.parameters(), lr=0.1)
    expected = [exact(x).detach(), *gradients(exact, exact(x).square().mean(), x)]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        later = (x * torch.ones(10_000_000, device="cuda").cumsum(0)[0]).detach().requires_grad_()  # takes its time
        y = net(later)
        found = [y.detach(), *gradients(net, y.square().mean(), later)]
        net(later).sum().backward()
        optimizer.step()
    torch.cuda.synchronize()
    step = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-5, "float16": 2**-8}[dtype]
    for own, true in zip(found, expected, strict=True):
        assert_close(own.double(), true, step)


def test_cuda_without_cupy_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpuback._backends.registry
    from gpuback.errors import BackendError

    backend = gpuback._backends.registry.BACKENDS["cupy"]._replace(
        status=lambda: gpuback._backends.registry.BackendStatus(False, "no CuPy")
    )
    monkeypatch.setitem(gpuback._backends.registry.BACKENDS, "cupy", backend)
    with pytest.raises(BackendError, match="no CuPy"):
        devices.ops_on.__wrapped__("cuda", 0)


# --- without PyTorch


def test_gpuback_itself_imports_no_other_library() -> None:
    code = "import gpuback, sys; assert not {'torch', 'onnx', 'jax', 'cupy', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_it_without_pytorch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "gpuback.torch")
    with pytest.raises(MissingExtraError, match=r"gpuback.torch needs PyTorch.*pip install '\.\[torch\]'"):
        importlib.import_module("gpuback.torch")
