"""Other libraries' adapters of the benchmark on a GPU compute what they are held to; here on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support import fake_cupy

from benchmarks.cases import Case, CheckFailedError, Network, selection
from benchmarks.peers import LeftOutError

NET = Network("n", (16, 8, 8, 5), 32)
CASES = [
    *(selection.layer((40, 8, 24), dtype) for dtype in ("float32", "bfloat16")),
    *(selection.training(NET, "step", dtype=dtype) for dtype in ("float32", "bfloat16")),
    selection.loss(NET),
]


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with fake_cupy.installed(without=[name for name in fake_cupy.OTHERS if not importlib.util.find_spec(name)]):
        yield


@pytest.fixture(params=["torch", "jax"])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip(request.param)
    found = importlib.import_module(f"benchmarks.peers.gpu_{'pytorch' if request.param == 'torch' else 'jax'}")
    if request.param == "jax":
        monkeypatch.setattr(found.jax_jit, "require_gpu", lambda: None)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.dtype}")
def test_results_are_the_oracles(adapter: Any, case: Case) -> None:
    check_of = importlib.import_module("benchmarks.cases.gpu_oracle").check_of
    made = adapter.contestant(case, "")
    check_of(case)(made.check(), "peer")
    for _ in range(2 * made.sets):  # all of them, round again
        made.call()
    made.wait()
    check_of(case)(made.check(), "peer")


def test_another_result_is_refused(adapter: Any) -> None:
    case = CASES[0]
    results = adapter.contestant(case, "").check()
    results["db"] = results["db"] + 1
    with pytest.raises(CheckFailedError, match="db is off by"):
        importlib.import_module("benchmarks.cases.gpu_oracle").check_of(case)(results, "peer")


def test_products_alone_are_the_layers() -> None:
    """The check makes the rest of a layer's results of them. They are held to what other libraries are."""
    pytest.importorskip("torch")
    adapter = importlib.import_module("benchmarks.peers.gpu_pytorch")
    oracle = importlib.import_module("benchmarks.cases.gpu_oracle")
    for case in CASES[:2]:
        made = adapter.contestant(case, "captured products")
        results = made.check()
        oracle.check_of(case)(results, "floor")
        assert made.graph == "torch" and len(made.call()) == 2
        results["dW"][0] += 1
        with pytest.raises(CheckFailedError, match="dW is off by"):
            oracle.check_of(case)(results, "floor")


def test_a_forward_pass_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    forward = importlib.import_module("benchmarks.hopper.gpu_forward")
    monkeypatch.setattr(forward.gpu_timing, "torch", torch)
    monkeypatch.setattr(forward.gpu_timing, "torch_graph", lambda call, sets: lambda: float(call().numel()))
    assert forward.timed((40, 24, 8), "PyTorch graph")["seconds"] == 40 * 24
    monkeypatch.setattr(torch, "relu", lambda x: x)
    with pytest.raises(CheckFailedError, match="h is off by"):
        forward.timed((40, 24, 8), "PyTorch graph")


def test_jax_knows_what_a_step_needs() -> None:
    pytest.importorskip("jax")
    case = selection.memory(NET, "device-memory")
    needed = importlib.import_module("benchmarks.peers.gpu_jax").memory(case, "")
    assert case.bytes <= needed < 20 * case.bytes


@pytest.mark.parametrize("dtype, precision", [("float32", "HIGHEST"), ("tf32", "HIGH,")])
def test_jax_is_told_how_to_multiply(dtype: str, precision: str) -> None:
    """On a GPU it would round float32 operands to TF32."""
    jax = pytest.importorskip("jax")
    exactly = importlib.import_module("benchmarks.peers.gpu_jax").exactly
    ones = jax.numpy.ones((2, 2))
    assert precision in str(
        jax.make_jaxpr(exactly(selection.training(NET, "step", dtype=dtype), lambda a, b: a @ b))(ones, ones)
    )


# ---- tiny-cuda-nn, of which there is a stand-in


def tiny_cuda_nn(spoil: float) -> Any:
    """Networks in float32 whose gradients may be off by a factor."""
    torch = pytest.importorskip("torch")
    adapter = importlib.import_module("benchmarks.peers.gpu_tiny_cuda_nn")

    class Network(torch.nn.Module):
        def __init__(self, n_in: int, n_out: int, configuration: dict[str, Any]) -> None:
            super().__init__()
            hidden = [configuration["n_neurons"]] * configuration["n_hidden_layers"]
            self.case = Case("step", "", (n_in, *hidden, n_out), 1)
            padded = [(n, -(-m // 16) * 16) for n, m in self.case.layers]
            self.params = torch.nn.Parameter(torch.randn(sum(n * m for n, m in padded)) / 4)
            self.params.register_hook(lambda gradient: spoil * gradient)

        def forward(self, x: Any) -> Any:
            return adapter.plain_forward(self.case, self.params, x)

    return SimpleNamespace(Network=Network)


FUSED = Network("n", (32, 16, 16, 10), 64)


def test_tiny_cuda_nn_is_held_to_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    contestant = importlib.import_module("benchmarks.peers.gpu_tiny_cuda_nn").contestant
    case = selection.training(FUSED, "step", dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "tinycudann", tiny_cuda_nn(1.0))
    assert contestant(case, "").check() == {}
    monkeypatch.setitem(sys.modules, "tinycudann", tiny_cuda_nn(1.2))
    with pytest.raises(CheckFailedError, match=r"gradient is off by 0\.2"):
        contestant(case, "").check()


@pytest.mark.parametrize(
    "net, dtype, why",
    [
        (FUSED, "float32", "computes in 16 bits"),
        (Network("n", (32, 16, 32, 10), 64), "bfloat16", "has hidden layers of one width"),
        (Network("n", (33, 16, 10), 64), "bfloat16", "pads inputs"),
    ],
)
def test_tiny_cuda_nn_says_what_it_cannot_do(net: Network, dtype: str, why: str) -> None:
    pytest.importorskip("torch")
    contestant = importlib.import_module("benchmarks.peers.gpu_tiny_cuda_nn").contestant
    with pytest.raises(LeftOutError, match=why):
        contestant(selection.training(net, "step", dtype=dtype), "")
