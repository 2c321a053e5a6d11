"""gpuback beside PyTorch: optimizers, clipping, losses, gradients, whole runs, and tensors as data.

Not part of the ordinary tests: `make test-peers`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback import MLP, SGD, Adam, AdamW, TrainStep
from gpuback._core.parameters import permutation
from gpuback.errors import DtypeError

torch = pytest.importorskip("torch")
functional = torch.nn.functional

OPTIMIZERS = [
    (SGD, torch.optim.SGD, {"lr": 0.03}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adam, torch.optim.Adam, {}),
    (Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.5}),
]
each_optimizer = pytest.mark.parametrize(
    "kind, peer, options", OPTIMIZERS, ids=lambda value: getattr(value, "__name__", str(value))
)


def ours(kind: Any, options: dict[str, Any]) -> Any:
    """Our optimizer with torch's options, whose default learning rates are ours as well."""
    return kind(**{("learning_rate" if name == "lr" else name): value for name, value in options.items()})


# --- optimizers


def torch_path(peer: Any, options: Any, start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """θ after every step, (steps, n)."""
    theta = torch.tensor(start, requires_grad=True)
    optimizer, path = peer([theta], **options), []
    for gradient in gradients:
        theta.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(theta.detach().numpy().copy())
    return np.array(path)


def our_path(kind: Any, options: Any, start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    net = MLP([len(start) - 1, 1], loss="squared_error", dtype=start.dtype)
    net.theta[:] = start
    optimizer, path = ours(kind, options), []
    for gradient in gradients:
        optimizer.step(net, SimpleNamespace(theta=gradient))
        path.append(net.theta.copy())
    return np.array(path)


def start_and_gradients() -> tuple[np.ndarray, np.ndarray]:
    """θ around 1, and 60 gradients of sizes from 10⁻⁹ to 10², some parameters' always 0."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-9, 2, 1001)
    scale[::50] = 0
    return rng.uniform(0.5, 2, 1001) * rng.choice([-1, 1], 1001), rng.standard_normal((60, 1001)) * scale


@each_optimizer
def test_sixty_steps_in_float64(kind: Any, peer: Any, options: Any) -> None:
    start, gradients = start_and_gradients()
    expected = torch_path(peer, options, start, gradients)
    path = our_path(kind, options, start, gradients)
    travelled = np.abs(np.diff(expected, axis=0, prepend=start[None])).cumsum(axis=0)
    assert (np.abs(path - expected) <= 1e-13 * (np.abs(expected) + travelled)).all()


@each_optimizer
def test_sixty_steps_in_float32_are_as_close_to_float64_as_torchs(kind: Any, peer: Any, options: Any) -> None:
    start, gradients = (array.astype(np.float32) for array in start_and_gradients())
    exact = torch_path(peer, options, start.astype(np.float64), gradients.astype(np.float64))
    travelled = np.abs(np.diff(exact, axis=0, prepend=start[None])).cumsum(axis=0)

    def error(path: np.ndarray) -> np.ndarray:
        return np.abs(path - exact) / (np.abs(exact) + travelled)

    theirs, own = error(torch_path(peer, options, start, gradients)), error(our_path(kind, options, start, gradients))
    assert own.max() <= 1.5 * theirs.max()
    assert own.mean() <= 1.2 * theirs.mean()


@each_optimizer
def test_learning_rate_schedules(kind: Any, peer: Any, options: Any) -> None:
    start, gradients = start_and_gradients()
    theta = torch.tensor(start, requires_grad=True)
    net = MLP([1000, 1], loss="squared_error", dtype="float64")
    net.theta[:] = start
    own, theirs = ours(kind, options), peer([theta], **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 60)
    for gradient in gradients:
        theta.grad = torch.tensor(gradient)
        own.learning_rate = theirs.param_groups[0]["lr"]
        own.step(net, SimpleNamespace(theta=gradient))
        theirs.step()
        schedule.step()
    np.testing.assert_allclose(net.theta, theta.detach(), rtol=1e-12)


# --- networks

ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "gelu": lambda a: functional.gelu(a, approximate="tanh"),
    "silu": functional.silu,
    "exponential": torch.exp,
    "squareplus": lambda a: (a + torch.sqrt(a * a + 4)) / 2,
    "selu": functional.selu,
    "softsign": functional.softsign,
    "log_sigmoid": functional.logsigmoid,
    "hard_tanh": functional.hardtanh,
    "relu6": functional.relu6,
    "hard_sigmoid": lambda a: torch.clamp(a + 3, 0, 6) / 6,  # hardsigmoid's float64 gradient has float32's 1/6
    "gelu_erf": functional.gelu,
    "sine": torch.sin,
    "mish": functional.mish,
    "hard_swish": lambda a: a * torch.clamp(a + 3, 0, 6) / 6,
}
OUTPUTS = {
    "identity": lambda a: a,
    "softmax": lambda a: torch.softmax(a, dim=1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
LOSSES = [
    ("cross_entropy", "softmax", "labels"),
    ("cross_entropy", "softmax", "probabilities"),
    ("binary_cross_entropy", "sigmoid", "probabilities"),
    ("squared_error", "identity", "values"),
    ("squared_error", "softmax", "values"),
    ("squared_error", "sigmoid", "values"),
    ("squared_error", "tanh", "values"),
]
each_loss = pytest.mark.parametrize("loss, output, targets", LOSSES, ids=["-".join(names) for names in LOSSES])


class Peer:
    """A network in torch with the parameters of one of ours."""

    def __init__(self, net: MLP) -> None:
        self.net = net
        self.parameters = [
            torch.tensor(np.array(part), requires_grad=True)
            for pair in zip(net.weights, net.biases, strict=True)
            for part in pair
        ]

    def outputs(self, x: Any) -> Any:
        """Pre-activations of the output layer."""
        names = [*self.net.architecture.activations, "identity"]
        for name, W, b in zip(names, self.parameters[::2], self.parameters[1::2], strict=True):
            x = ACTIVATIONS[name](functional.linear(x, W, b))
        return x

    def loss(self, x: Any, y: Any, weight: Any | None) -> Any:
        a, architecture = self.outputs(x), self.net.architecture
        if architecture.loss == "cross_entropy":
            each = functional.cross_entropy(a, y, reduction="none")
        elif architecture.loss == "binary_cross_entropy":
            each = functional.binary_cross_entropy_with_logits(a, y, reduction="none").sum(dim=1)
        else:
            each = 0.5 * (OUTPUTS[architecture.output](a) - y).square().sum(dim=1)
        return (each if weight is None else each * weight).mean()

    @property
    def theta(self) -> np.ndarray:
        return np.concatenate([part.detach().numpy().ravel() for part in self.parameters])

    @property
    def gradient(self) -> np.ndarray:
        return np.concatenate([part.grad.numpy().ravel() for part in self.parameters])


def data(net: MLP, targets: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, shape = rng.standard_normal((size, net.sizes[0])), (size, net.sizes[-1])
    if targets == "labels":
        y = rng.integers(net.sizes[-1], size=size)
    elif targets == "probabilities":
        y = rng.dirichlet(np.ones(shape[1]), size)
    else:
        y = rng.standard_normal(shape)
    return x, y, rng.uniform(0, 3, size)


def assert_close(actual: Any, expected: Any) -> None:
    """To 12 digits of the largest element: sums that cancel keep the rounding of their terms."""
    expected = np.asarray(expected)
    assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_loss
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_losses_and_gradients(activation: str, loss: str, output: str, targets: str, weighted: bool) -> None:
    net = MLP([6, 9, 7, 5], activation=activation, loss=loss, output=output, dtype="float64", seed=0)
    net.theta[:] += 0.1 * np.random.default_rng(1).standard_normal(net.n_parameters)  # biases too
    x, y, w = data(net, targets, 83)
    weight = w if weighted else None
    value, gradients = net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)

    peer, x_peer = Peer(net), torch.tensor(x, requires_grad=True)
    expected = peer.loss(x_peer, torch.tensor(y), torch.tensor(w) if weighted else None)
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert_close(gradients.theta, peer.gradient)
    for part, same in zip(
        [*gradients.weights, *gradients.biases], peer.parameters[::2] + peer.parameters[1::2], strict=True
    ):
        assert_close(part, same.grad)
    assert_close(gradients.inputs, x_peer.grad)
    assert_close(net.forward(x), OUTPUTS[output](peer.outputs(torch.tensor(x))).detach())


@pytest.mark.parametrize("size", [1e3, 1e-3])
@each_loss
def test_logits_far_from_zero(loss: str, output: str, targets: str, size: float) -> None:
    """Where exp would overflow or vanish if it were taken as it stands in the formula."""
    net = MLP([4, 3], loss=loss, output=output, dtype="float64", seed=0)
    x, y, _ = data(net, targets, 50)
    x *= size
    value, gradients = net.value_and_grad(x, y)
    peer = Peer(net)
    expected = peer.loss(torch.tensor(x), torch.tensor(y), None)
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_close(gradients.theta, peer.gradient)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@each_loss
def test_float32_is_as_close_to_float64_as_torchs(activation: str, loss: str, output: str, targets: str) -> None:
    options = {"activation": activation, "loss": loss, "output": output, "seed": 0}
    net, exact = MLP([30, 64, 50, 10], **options), MLP([30, 64, 50, 10], dtype="float64", **options)
    exact.theta[:] = net.theta
    x, y, w = data(net, targets, 300)
    x, w = x.astype(np.float32), w.astype(np.float32)
    y = y if targets == "labels" else y.astype(np.float32)
    peer = Peer(net)
    peer.loss(torch.tensor(x), torch.tensor(y), torch.tensor(w)).backward()
    expected = exact.value_and_grad(x, y, sample_weight=w)[1].theta
    own = net.value_and_grad(x, y, sample_weight=w)[1].theta
    # Their BLAS libraries cut sums in different pieces, which is worth a factor of 2.
    assert np.linalg.norm(own - expected) <= 3 * np.linalg.norm(peer.gradient - expected)


# --- training


@pytest.mark.parametrize(
    "clip_norm, factor", [(0.01, 1e3), (0.01, 1.0), (1.0, 1e3), (1.0, 1.0), (1.0, 1e-3), (1e9, 1.0)]
)
@each_optimizer
def test_clipped_steps(kind: Any, peer: Any, options: Any, clip_norm: float, factor: float) -> None:
    net = MLP([6, 9, 5], activation="tanh", loss="squared_error", dtype="float64", seed=0)
    twin = Peer(net)
    step, optimizer = TrainStep(net, ours(kind, options), clip_norm=clip_norm), peer(twin.parameters, **options)
    for batch in range(5):
        x, y, w = data(net, "values", 20, seed=batch)
        loss = step(x, y, w * factor)
        optimizer.zero_grad()
        expected = twin.loss(torch.tensor(x), torch.tensor(y), torch.tensor(w * factor))
        expected.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters, clip_norm)
        optimizer.step()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
    np.testing.assert_allclose(net.theta, twin.theta, rtol=1e-9, atol=1e-11)


@each_optimizer
def test_fit_is_the_loop_that_torch_users_write(kind: Any, peer: Any, options: Any) -> None:
    net = MLP([6, 9, 5], activation="silu", dtype="float64", seed=0)
    x, y, w = data(net, "labels", 50)
    twin = Peer(net)
    history = gpuback.fit(
        net, x, y, sample_weight=w, optimizer=ours(kind, options), epochs=3, batch_size=16, seed=4, clip_norm=0.5
    )
    optimizer, losses = peer(twin.parameters, **options), []
    tensors = torch.utils.data.TensorDataset(*map(torch.tensor, (x, y, w)))
    for epoch in range(3):
        total = 0.0
        for batch in torch.utils.data.DataLoader(tensors, batch_size=16, sampler=permutation(50, 4, epoch).tolist()):
            optimizer.zero_grad()
            loss = twin.loss(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters, 0.5)
            optimizer.step()
            total += float(loss.detach()) * len(batch[0])
        losses.append(total / 50)
    np.testing.assert_allclose(net.theta, twin.theta, rtol=1e-9, atol=1e-11)
    assert history.loss == pytest.approx(losses, rel=1e-11)


# --- tensors as data


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@each_loss
def test_tensors_are_taken_as_arrays_are(loss: str, output: str, targets: str, dtype: str) -> None:
    net = MLP([6, 9, 5], loss=loss, output=output, dtype=dtype, seed=0)
    x, y, w = data(net, targets, 20)
    value, gradients = net.value_and_grad(x, y, sample_weight=w)
    x_tensor = torch.tensor(x.T.copy()).T  # not contiguous
    again, same = net.value_and_grad(x_tensor, torch.tensor(y), sample_weight=torch.tensor(w))
    assert value == again
    assert gradients.theta.tobytes() == same.theta.tobytes()
    twin = MLP([6, 9, 5], loss=loss, output=output, dtype=dtype, seed=0)
    gpuback.fit(net, x, y, epochs=2, batch_size=7, seed=0)
    gpuback.fit(twin, x_tensor, torch.tensor(y), epochs=2, batch_size=7, seed=0)
    assert net.theta.tobytes() == twin.theta.tobytes()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_tensors_of_labels(dtype: Any) -> None:
    net = MLP([6, 2], seed=0)
    x, y, _ = data(net, "labels", 20)
    assert net.loss(x, torch.tensor(y).to(dtype)) == net.loss(x, y)


def test_tensors_of_labels_that_are_no_integers_are_refused() -> None:
    with pytest.raises(DtypeError, match="^y: expected integer labels"):
        MLP([6, 2], seed=0).loss(np.ones((3, 6)), torch.tensor([0.0, 0.7, 1.0]))


def test_results_are_taken_by_torch_without_a_copy() -> None:
    net = MLP([6, 2], seed=0)
    outputs = torch.from_dlpack(net.forward(np.ones((3, 6))))
    assert outputs.shape == (3, 2)
    theta = torch.from_dlpack(net.theta)
    theta.zero_()
    assert not net.theta.any()
    assert net.forward(np.ones((3, 6))).tolist() == [[0.5, 0.5]] * 3
