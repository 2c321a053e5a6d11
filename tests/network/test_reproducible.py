"""reproducible=True: the same bits whoever multiplies, in whatever order, on whichever backend."""

from __future__ import annotations

import copy
import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exact_reference import ReferenceOps
from support.reference_bits import DIGITS_AFTER_200_STEPS, KNOWN, core_types, in_a_process, trained

import gpuback
from gpuback import MLP, SGD, Adam, TrainStep
from gpuback._backends.exact import numpy_products
from gpuback._backends.exact import products as exact_products
from gpuback._backends.exact.cuda_ops import CudaExactBackend
from gpuback._backends.exact.losses import RULES, row_sums
from gpuback._backends.exact.numpy_ops import ReproducibleNumpyOps
from gpuback._core.elementary_activations import FORWARD
from gpuback._core.losses import LOSSES
from gpuback._training.optimizers import Optimizer
from gpuback.errors import DtypeError, OptionError, ShapeError
from gpuback.testing import fingerprint, random_batch

pytestmark = pytest.mark.on_each_backend

DTYPES = ("float32", "bfloat16", "float16")
PAIRS = [(loss.name, output) for loss in LOSSES.values() for output in loss.outputs]


def network(sizes=(5, 7, 6, 3), **options):
    return MLP(sizes, **{"seed": 1, "reproducible": True, **options})


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


def gradient_bits(net, x, y, **options) -> tuple[bytes, ...]:
    loss, gradients = net.value_and_grad(x, y, **options)
    inputs = () if gradients.inputs is None else (bits(gradients.inputs),)
    return bits(loss), bits(gradients.theta), *inputs


# ---- Known answers: the same on every machine


@pytest.mark.parametrize("case", KNOWN, ids="-".join)
def test_fingerprints_are_the_known_ones(case):
    assert fingerprint(trained(*case)) == KNOWN[case]


@pytest.mark.thorough(first=1)
@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "core_type, threads, wide_vectors, row_order",
    [(None, 2, True, 0), ("Haswell", 1, False, 1), ("Haswell", 2, True, 2), ("SkylakeX", 1, True, 3)],
)
def test_digits_come_to_the_known_bits_whatever_the_processor(core_type, threads, wide_vectors, row_order):
    if core_type not in core_types():
        pytest.skip(f"this processor cannot run OpenBLAS's kernels for {core_type}")
    arguments = ["--backend", "numpy", "--steps", "200", "--row-order", str(row_order)]
    found = in_a_process(arguments, core_type=core_type, threads=threads, wide_vectors=wide_vectors)
    assert found == DIGITS_AFTER_200_STEPS


# ---- Nothing that must not matter does


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss, output", PAIRS)
def test_the_order_of_rows_does_not_matter(loss, output, dtype):
    net = network(loss=loss, output=output, dtype=dtype, activation=("gelu", "tanh"))
    x, y = random_batch(net, 50)
    weight = np.random.default_rng(0).random(50)
    order = np.random.default_rng(1).permutation(50)
    assert gradient_bits(net, x, y, sample_weight=weight) == gradient_bits(
        net, x[order], y[order], sample_weight=weight[order]
    )
    assert bits(net.forward(x)[order]) == bits(net.forward(x[order]))


def in_random_order(left, right, out):
    order = np.random.default_rng().permutation(left.shape[1])
    out[...] = 0
    for k in order:
        out += np.outer(left[:, k], right[k])


def pairwise(left, right, out):
    terms = [np.outer(left[:, k], right[k]) for k in range(left.shape[1])]
    while len(terms) > 1:
        terms = [sum(pair) for pair in zip(*[iter(terms)] * 2, strict=False)] + terms[len(terms) // 2 * 2 :]
    out[...] = terms[0]


def in_blocks(left, right, out):
    out[...] = sum(left[:, k : k + 7] @ right[k : k + 7] for k in range(0, left.shape[1], 7))


def by_einsum(left, right, out):
    np.einsum("ik,kj->ij", left, right, out=out)


@pytest.mark.parametrize("multiply", [in_random_order, pairwise, in_blocks, by_einsum])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whoever_multiplies_the_bits_are_the_same(dtype, multiply, monkeypatch):
    net = network(dtype=dtype, activation="silu")
    x, y = random_batch(net, 30)
    expected = gradient_bits(net, x, y, need_input_grad=True)
    other = copy.copy(net.ops)
    other._multiply = multiply
    monkeypatch.setattr(net, "_ops", other)
    net._pool.clear()
    assert gradient_bits(net, x, y, need_input_grad=True) == expected


@pytest.mark.parametrize("at_once, block", [(3, 8192), (7, 5), (64, 4), (1, 1)])
def test_how_products_are_cut_does_not_matter(at_once, block, monkeypatch):
    net = network((9, 11, 10, 4))
    x, y = random_batch(net, 41)
    expected = gradient_bits(net, x, y, need_input_grad=True)
    monkeypatch.setattr(CudaExactBackend, "rows_at_once", lambda self, widest: at_once)
    monkeypatch.setattr(numpy_products, "rows_at_once", lambda widest: at_once)
    monkeypatch.setattr(exact_products, "BLOCK", block)
    monkeypatch.setattr(exact_products, "slice_bits", SLICE_BITS)  # bits follow from the contract's block
    net._pool.clear()
    assert gradient_bits(net, x, y, need_input_grad=True) == expected


def special_batch(net, rows: int, seed: int = 0):
    """Samples of which some are 0, subnormal, huge, infinite or NaN."""
    x, y = random_batch(net, rows, seed)
    x = np.asarray(x, np.float32).copy()
    rng = np.random.default_rng(seed)
    x *= np.float32(2.0) ** rng.integers(-60, 20, x.shape).astype(np.float32)
    values = np.array([0.0, -0.0, 1e-45, 3e-39, 3e38, np.inf, -np.inf, np.nan], np.float32)
    where = rng.random(x.shape) < 0.02
    x[where] = rng.choice(values[: 5 if seed else 8], int(where.sum()))
    return x, y


@pytest.mark.thorough(first=2)
@pytest.mark.numpy_only
@pytest.mark.parametrize(
    "rows, at_once, block, threads", [(1, 8, 8192, 2), (41, 64, 8192, 1), (41, 4, 9, 3), (57, 7, 57, 2)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "hard_tanh", "gelu", "softplus"])
def test_bits_are_those_of_the_products_as_written_down(activation, dtype, rows, at_once, block, threads, monkeypatch):
    """`ReferenceOps` cuts into integers, adds blocks and goes over the whole batch, operation by operation."""
    monkeypatch.setattr(exact_products, "BLOCK", block)
    monkeypatch.setattr(numpy_products, "rows_at_once", lambda widest: at_once)
    monkeypatch.setattr(numpy_products, "WORTH_THREADS", 0)
    monkeypatch.setattr(numpy_products, "blas_threads", lambda: threads)
    for seed in range(2):
        net = network((9, 11, 10, 4), dtype=dtype, activation=activation)
        x, y = special_batch(net, rows, seed)
        found = gradient_bits(net, x, y, need_input_grad=True), bits(net.forward(x))
        other = network((9, 11, 10, 4), dtype=dtype, activation=activation)
        monkeypatch.setattr(other, "_ops", ReferenceOps())
        assert found == (gradient_bits(other, x, y, need_input_grad=True), bits(other.forward(x)))


SLICE_BITS = {terms: exact_products.slice_bits(terms) for terms in range(1, 100)}.__getitem__


def test_library_functions_take_no_part(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a library's function, whose bits vary")

    names = (
        "exp",
        "expm1",
        "exp2",
        "log",
        "log1p",
        "log2",
        "tanh",
        "power",
        "sum",
        "mean",
        "matmul",
        "einsum",
        "logaddexp",
    )
    nets = [network(activation=name) for name in FORWARD]
    nets += [network(loss=loss, output=output) for loss, output in PAIRS]
    batches = [random_batch(net, 6) for net in nets]
    for name in names:
        monkeypatch.setattr(np, name, refuse)
    for net, (x, y) in zip(nets, batches, strict=True):
        TrainStep(net, Adam(), clip_norm=0.1)(x, y)
        net.forward(x)


# ---- Why: sums of integers


@given(st.integers(1, 2**23 - 1))
def test_no_sum_is_ever_rounded(terms):
    s, block = exact_products.slice_bits(terms), min(terms, exact_products.BLOCK)
    assert block * 2 ** (2 * s) <= 2**53  # P, and Q by pairs: |a₁b₂ + a₂b₁| ≤ 2·2ˢ·2ˢ⁻¹
    assert terms * 2 ** (2 * s) < 2**63


@pytest.mark.numpy_only
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(13, 26)
)
def test_slices_are_whole_and_leave_out_little(values, bits_of_a_slice):
    x = np.array([values], np.float32)
    scales, first, second = numpy_products.Scales(1, bits_of_a_slice), np.empty(x.shape), x.astype(np.float64)
    np.maximum.reduce(np.abs(x), axis=1, out=scales.largest, initial=numpy_products.SMALLEST)
    scales.update()
    numpy_products.bind_split(first, second, scales.inverse[:, None], bits_of_a_slice)()
    assert (first == np.rint(first)).all() and (second == np.rint(second)).all()
    assert np.abs(first).max() <= 2**bits_of_a_slice and np.abs(second).max() <= 2 ** (bits_of_a_slice - 1)
    sigma = Fraction(2) ** math.frexp(float(scales.largest[0]))[1]
    assert Fraction(float(scales.unit[0])) * 2**bits_of_a_slice == sigma
    for value, one, two in zip(values, first[0], second[0], strict=True):
        kept = sigma * (Fraction(one) / 2**bits_of_a_slice + Fraction(two) / 4**bits_of_a_slice)
        assert abs(kept - Fraction(value)) <= sigma / 2 ** (2 * bits_of_a_slice + 1)


def layer(K: int, outliers: bool, seed: int = 0):
    """(da, h_prev) of mixed signs; with outliers, columns of 1e6 beside columns of 1e-6."""
    rng = np.random.default_rng(seed)
    da, h = rng.standard_normal((K, 9)).astype(np.float32), rng.standard_normal((K, 12)).astype(np.float32)
    if outliers:
        da[:, ::2] *= 1e6
        h[:, 1::3] *= 1e-6
        h[:, ::4] *= 1e6
    return da, h


@pytest.mark.numpy_only
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("K", [1, 2, 100, 1025, 20000])
def test_errors_keep_to_the_bound(K, outliers):
    da, h = layer(K, outliers)
    W = np.random.default_rng(1).standard_normal((9, 12)).astype(np.float32)
    ops, precision = ReproducibleNumpyOps(), network().architecture.precision
    workspace = ops.workspace(K, (12, 9), precision)
    dW, db, dh = np.empty((9, 12), np.float32), np.empty(9, np.float32), np.empty((K, 12), np.float32)
    ops.bind_backward(da, W, dh, None, None, 1.0, workspace)(h, dW, db, False)

    exact = [np.longdouble(array) for array in (da, h, W)]
    products = [(exact[0].T, exact[1], dW), (exact[0].T, np.ones((K, 1)), db[:, None]), (exact[0], exact[2], dh)]
    for left, right, result in products:
        true, terms = left @ right, left.shape[1]
        largest = np.outer(np.abs(left).max(axis=1), np.abs(right).max(axis=0))
        bound = 2.0**-24 * np.abs(true) + 5 * terms * 2.0 ** (-2 * exact_products.slice_bits(terms)) * largest
        assert (np.abs(result - true) <= bound).all()
        assert np.abs(true).max() > 100 * bound.max() or terms == 1


@given(st.integers(1, 200), st.integers(0, 2**32))
def test_sums_of_rows_are_accurate(n, seed):
    x = np.random.default_rng(seed).standard_normal((3, n))
    expected = np.array([math.fsum(row) for row in x])
    assert np.abs(row_sums(x) - expected).max() <= 2.0**-53 * (n / 32 + 5) * np.abs(x).sum(axis=1).max()


# ---- What a network of this kind can do


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FORWARD)
def test_gradients_pass_the_check(activation, dtype):
    net = network(activation=activation, dtype=dtype, loss="squared_error")
    if activation == "exponential":
        net.theta[:] *= 0.5  # so that float16 holds what two of them make
    x, y = random_batch(net, 20)
    report = gpuback.check_gradients(net, x, y)
    assert report.passed, report


@pytest.mark.parametrize("loss, output", PAIRS)
def test_loss_and_outputs_are_near_those_of_the_plain_mode(loss, output):
    net = network(loss=loss, output=output)
    plain = network(loss=loss, output=output, reproducible=False)
    x, y = random_batch(net, 20)
    np.testing.assert_allclose(net.loss(x, y), plain.loss(x, y), rtol=1e-6)
    np.testing.assert_allclose(net.forward(x), plain.forward(x), rtol=1e-5, atol=1e-6)
    assert float(net.value_and_grad(x, y)[0]) == float(net.loss(x, y))


def test_the_mode_goes_with_the_network(tmp_path):
    net = network()
    net.save(tmp_path / "net.safetensors")
    loaded = MLP.load(tmp_path / "net.safetensors")
    for other in (loaded, copy.deepcopy(net), net.to("numpy")):
        assert other.ops.reproducible
        assert other.architecture == net.architecture
    assert "reproducible=True" in repr(net)
    assert not network(reproducible=False).ops.reproducible


def test_a_run_moves_between_backends(tmp_path):
    file, x, y = tmp_path / "run.safetensors", *random_batch(network(), 60)
    options = {"batch_size": 16, "seed": 3, "validation": 0.2, "clip_norm": 1.0}

    def trained(backend: str, epochs: int, **more) -> MLP:
        net = network(backend=backend)
        gpuback.fit(net, x, y, epochs=epochs, optimizer=Adam(0.01), **options, **more)
        return net

    expected = trained("numpy", 4)
    assert fingerprint(trained("auto", 4)) == fingerprint(expected)
    trained("auto", 2, checkpoint=file)
    assert fingerprint(trained("numpy", 4, checkpoint=file, resume=True)) == fingerprint(expected)


def test_histories_have_the_same_bits():
    x, y = random_batch(network(), 60)

    def losses(backend: str, order: int) -> list[float]:
        net = network(backend=backend)
        history = gpuback.fit(net, x, y, epochs=3, batch_size=16, seed=order, validation=0.25)
        return history.loss + history.validation_loss

    assert losses("auto", 1) == losses("numpy", 1) != losses("numpy", 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_and_has_one_form(bad):
    net = network(activation="identity")
    x, y = random_batch(net, 10)
    x[3, 2] = bad
    loss, gradients = net.value_and_grad(x, y)
    canonical = np.float32(np.nan).view(np.uint32)
    for array in (loss, gradients.theta, net.forward(x)):
        values = np.asarray(array)
        assert np.isnan(values).any()
        assert set(values[np.isnan(values)].view(np.uint32)) == {canonical}
    assert np.isfinite(np.asarray(net.forward(x))[[0, 1, 2, 4, 9]]).all()  # other rows have nothing to do with it
    step = TrainStep(net, Adam())
    before = bits(net.theta)
    step(x, y)
    assert bits(net.theta) == before and step.diverged_at == 0


def test_zeros_have_one_sign():
    net = network((3, 4, 2), activation="identity", loss="squared_error")
    net.theta[...] = -0.0
    x = np.array([[0.0, -0.0, 0.0], [-1.0, 0.0, 1.0]])
    outputs = np.asarray(net.forward(x))
    assert (outputs == 0).all() and not np.signbit(outputs).any()
    gradients = np.asarray(net.value_and_grad(x, outputs)[1].theta)
    assert (gradients == 0).all() and not np.signbit(gradients).any()


def test_accumulation_and_input_gradients():
    net = network(activation="softplus")
    x, y = random_batch(net, 12)
    _, once = net.value_and_grad(x, y, need_input_grad=True)
    single, inputs = np.array(once.theta), np.array(once.inputs)
    net.value_and_grad(x, y, out=once, accumulate=True)
    assert bits(once.theta) == bits(single + single)
    trace = net.trace(x, y)
    assert bits(trace.dh[0]) == bits(inputs)
    assert bits(trace.dW[2]) == bits(single[once.weights[0].size + len(once.biases[0]) :][: trace.dW[2].size])


def test_explain_says_what_it_costs():
    exact, plain = (network(reproducible=mode).explain(100) for mode in (True, False))
    assert "3 exact float64" in str(exact) and "3 exact float64" not in str(plain)
    update = exact.steps[-1].flops
    assert exact.flops - update == 3 * (plain.flops - update)
    assert exact.bytes > 5 * plain.bytes


@pytest.mark.thorough
@pytest.mark.numpy_only
def test_outputs_take_memory_for_a_part_of_the_batch_only():
    net = network((8, 64, 64, 3))
    x, y = random_batch(net, 100_000)
    x = x.astype(np.float32)
    tracemalloc.start()
    net.forward(x)
    net.loss(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, f"{peak:,} bytes"  # all rows of the hidden layers would take 51 MB
    order = np.random.default_rng(0).permutation(len(x))
    assert bits(net.loss(x, y)) == bits(net.loss(x[order], y[order])) == bits(net.value_and_grad(x, y)[0])


def test_numpys_scalars_as_hyper_parameters_change_nothing():
    """A schedule may set them, and `np.float64` makes NumPy compute float32 arrays in float64."""

    def trained(kind) -> MLP:
        net = network()
        x, y = random_batch(net, 20)
        step = TrainStep(net, SGD(0.1, momentum=0.5), clip_norm=1.0)
        step.optimizer.momentum, step.optimizer.weight_decay = kind(0.9), kind(1e-3)
        step.clip_norm = kind(0.05)
        adam = Adam(0.01)
        for _ in range(3):
            step(x, y)
        other = MLP(net.sizes, seed=1, reproducible=True)
        other.theta[...] = net.theta
        adam.betas, adam.eps, adam.weight_decay = (kind(0.8), kind(0.9)), kind(1e-7), kind(1e-3)
        for _ in range(3):
            adam.step(other, other.value_and_grad(x, y)[1])
        return other

    assert fingerprint(trained(np.float64)) == fingerprint(trained(float))


@pytest.mark.parametrize("gap", [1, 10, 30, 60, 200])
def test_sure_predictions_keep_their_digits(gap):
    net = network((2, 2), activation=())
    net.theta[...] = np.array([1, 0, 0, 1, 0, 0])  # a = x
    x, y = np.array([[float(gap), 0.0]]), np.array([0])
    trace = net.trace(x, y)
    assert trace.loss == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-6, abs=1e-45)
    share = math.exp(-gap) / (1.0 + math.exp(-gap))
    np.testing.assert_allclose(trace.da[1], [[-share, share]], rtol=1e-6, atol=1e-45)


@pytest.mark.parametrize("a", [-200.0, -40.0, -1.0, 0.0, 3.0, 40.0, 100.0])
@pytest.mark.parametrize("target", [0.0, 1.0, 0.25])
def test_sure_probabilities_keep_their_digits(a, target):
    net = network((1, 1), activation=(), loss="binary_cross_entropy")
    net.theta[...] = np.array([1.0, 0.0])
    trace = net.trace(np.array([[a]]), np.array([[target]]))
    sigmoid = {s: math.exp(min(s * a, 0.0)) / (1.0 + math.exp(-abs(a))) for s in (1, -1)}
    expected = (1.0 - target) * sigmoid[1] - target * sigmoid[-1]
    np.testing.assert_allclose(trace.da[1], [[expected]], rtol=1e-6, atol=1e-45)


# ---- What is refused


def test_a_loss_without_fixed_operations_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(RULES, ("squared_error", "tanh"))
    net = network(loss="squared_error", output="tanh")
    x, y = random_batch(net, 3)
    with pytest.raises(OptionError, match="'squared_error' with output 'tanh' has no reproducible form"):
        net.loss(x, y)


def test_what_has_no_bits_has_no_fingerprint():
    for what in (None, object(), Adam(), {}, [np.zeros(2), np.zeros(3, object)]):
        with pytest.raises((DtypeError, ValueError)):
            fingerprint(what)
    net = network()
    assert fingerprint(net.value_and_grad(*random_batch(net, 3))[1]) != fingerprint(net)


@pytest.mark.parametrize(
    "options, words", [({"dtype": "float64"}, "not with float64"), ({"allow_tf32": True}, "tensor cores")]
)
def test_what_cannot_be_reproducible_is_refused(options, words):
    with pytest.raises(OptionError, match=words):
        network(**options)


@pytest.mark.parametrize("name", ["gelu_erf", "sine"])
def test_an_activation_without_fixed_operations_is_refused_by_name(name):
    with pytest.raises(OptionError, match=f"'{name}' has no reproducible form: expected one of identity, relu, "):
        network(activation=name)


def test_an_optimizer_without_fixed_operations_is_refused_by_name():
    class Sluggish(Optimizer):
        def _bind_update(self, ops, theta, step_count):
            raise AssertionError("bound")

    with pytest.raises(OptionError, match="Sluggish has no reproducible form"):
        TrainStep(network(), Sluggish(0.1, 0.0))


def test_too_long_sums_are_refused(monkeypatch):
    monkeypatch.setattr(exact_products, "LONGEST", 9)
    net = network()
    x, y = random_batch(net, 10)
    with pytest.raises(ShapeError, match="a batch of at most 9 rows with reproducible=True"):
        net.value_and_grad(x, y)
    net.value_and_grad(x[:9], y[:9])
    for sizes in ((10, 3, 2), (3, 10, 2)):
        wide = network(sizes)
        with pytest.raises(ShapeError, match="layers of at most 9 units"):
            wide.forward(np.ones((2, sizes[0])))


def test_every_pair_of_loss_and_output_has_a_rule():
    assert set(RULES) == set(PAIRS)


# ---- Fingerprints


def test_a_fingerprint_is_of_bits_shape_and_dtype():
    array = np.arange(6, dtype=np.float32)
    assert fingerprint(array) == fingerprint(array.copy()) == fingerprint(np.asfortranarray(array))
    assert fingerprint(array.astype(">f4")) == fingerprint(array)
    others = [array.reshape(2, 3), array.reshape(3, 2), array.astype(np.int32), -array, array.astype(np.float64)]
    prints = [fingerprint(other) for other in (array, *others)]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)
    net = network()
    assert fingerprint(net) == fingerprint(net.theta)
    assert fingerprint(net.weights[0]) == fingerprint(np.array(net.weights[0]))
    assert all(a != b for a, b in itertools.pairwise([fingerprint(network(seed=s)) for s in range(3)]))


@settings(max_examples=30)
@given(st.integers(0, 31))
def test_a_single_bit_changes_the_fingerprint(bit):
    array = np.ones(3, np.float32)
    before = fingerprint(array)
    array.view(np.uint32)[1] ^= np.uint32(1 << bit)
    assert fingerprint(array) != before
