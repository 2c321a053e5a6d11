"""The command line as its users meet it: what it prints and writes, exit codes, one line for whatever goes wrong."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.reference_bits import core_types

import gpuback
import gpuback.testing
from gpuback import datasets
from gpuback._cli import BROKEN_PIPE, FAILED, INTERRUPTED, USAGE, blas_kernels, machine, tasks, words
from gpuback._cli import main as cli
from gpuback._cli.blas_kernels import Comparison
from gpuback._network.mlp import MLP
from gpuback.datasets import Schema
from gpuback.datasets.standardization import Standardization

PNG = b"\x89PNG\r\n"


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty folder of its own, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


def start(*arguments: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a command in a process of its own."""
    root = str(Path(gpuback.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "gpuback", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def assert_one_line(ran: Ran, code: int) -> None:
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("gpuback: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    assert "Traceback" not in ran.err
    assert "[Errno" not in ran.err


def succeeded(ran: Ran) -> Ran:
    assert ran.code == 0, ran.err
    return ran


def columns_of(text: str) -> dict[str, list[str]]:
    header, *rows = list(csv.reader(text.splitlines()))
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def small_csv(path: Path, rows: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Writes three features and two classes that they tell apart, the target in the middle; returns both."""
    rng = np.random.Generator(np.random.PCG64(5))
    x = np.array([10.0, -300.0, 0.02]) + np.array([2.0, 90.0, 0.004]) * rng.standard_normal((rows, 3))
    y = (x[:, 0] > 10.0).astype(int)
    lines = ["length,kind,width,mass"] + [f"{a},{label},{b},{c}" for (a, b, c), label in zip(x, y, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return x, y


# train


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("core_type", ["Haswell", "SkylakeX"])
def test_a_reproducible_run_comes_to_the_known_bits(core_type, tmp_path):
    """Standardization included."""
    if core_type not in core_types():
        pytest.skip(f"this processor cannot run OpenBLAS's kernels for {core_type}")
    command = ["train", "iris", "--hidden", "8", "--epochs", "3", "--reproducible", "--no-plot", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuback.__file__).parents[1]), "OPENBLAS_CORETYPE": core_type}
    done = subprocess.run(
        [sys.executable, "-m", "gpuback", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    result = json.loads(done.stdout)
    assert result["network"]["reproducible"] is True
    assert result["fingerprint"] == "1de47accba7164ec"
    assert gpuback.testing.fingerprint(MLP.load(tmp_path / "iris.safetensors")) == "1de47accba7164ec"


def test_the_fingerprint_of_a_reproducible_run_is_shown(run: Run) -> None:
    told = succeeded(run("train", "iris", "--epochs", "1", "--no-plot", "--reproducible")).out
    assert gpuback.testing.fingerprint(MLP.load("iris.safetensors")) in told
    assert "fingerprint" not in succeeded(run("train", "iris", "--epochs", "1", "--no-plot")).out


@pytest.mark.parametrize("name", datasets.BUILT_IN)
def test_train_on_built_in_sets(run: Run, tmp_path: Path, name: str) -> None:
    ran = succeeded(run("train", name, "--epochs", 3, "--hidden", "8,4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.png", f"{name}.safetensors"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    data = datasets.load(name)
    schema = Schema.load(tmp_path / f"{name}.safetensors")
    outputs = MLP.load(tmp_path / f"{name}.safetensors").forward(schema.inputs(name))
    assert outputs.shape == (len(data.x), 1 if data.task == "regression" else data.n_classes)
    for text in ("parameters", "training loss", "held-out loss", f"{name}.safetensors", f"{name}.png", "ms a step"):
        assert text in ran.out
    assert ("held-out R²" if name == "diabetes" else "held-out accuracy") in ran.out
    assert "cupy" in ran.out  # why this backend
    assert ran.err == ""


def test_digits_comes_to_97_percent_by_default(run: Run, tmp_path: Path) -> None:
    document = json.loads(succeeded(run("train", "digits", "--no-plot", "--json")).out)
    assert document["held_out_score"]["accuracy"] >= 0.97
    # What was measured is what was saved, on raw pixels.
    score = json.loads(run("predict", "digits.safetensors", "digits", "--score", "--json").out)["score"]
    assert score["accuracy"] >= 0.99
    assert document["network"]["parameters"] == MLP.load(tmp_path / "digits.safetensors").n_parameters


def test_the_same_seed_makes_the_same_file(run: Run, tmp_path: Path) -> None:
    for seed, name in ((4, "a"), (4, "b"), (5, "c")):
        succeeded(run("train", "iris", "--epochs", 2, "--seed", seed, "--model", name, "--no-plot", "-q"))
    contents = [(tmp_path / name).read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_standardization_is_in_the_network(run: Run) -> None:
    """Wine's features differ in scale by a thousand: raw, 20 epochs get nowhere."""
    scores = [
        json.loads(succeeded(run("train", "wine", "--epochs", 20, "--no-plot", "--json", option)).out)["held_out_score"]
        for option in ("--standardize", "--no-standardize")
    ]
    assert scores[0]["accuracy"] > 0.9 > scores[1]["accuracy"]


def test_the_held_out_samples_stay_unseen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the scaling nor a step of training knows them."""
    seen = []
    right, fit = Standardization.of_features, gpuback.fit
    monkeypatch.setattr(Standardization, "of_features", lambda x: seen.append(x) or right(x))
    monkeypatch.setattr(gpuback, "fit", lambda net, x, y, **options: seen.append(x) or fit(net, x, y, **options))
    succeeded(run("train", "iris", "--epochs", 1, "--held-out", 0.3, "--no-plot"))
    *columns, trained_on = seen
    assert [len(x) for x in columns] == 4 * [105]
    raw = np.concatenate(columns, axis=1)
    np.testing.assert_allclose(trained_on, (raw - raw.mean(axis=0)) / raw.std(axis=0), rtol=1e-5, atol=1e-6)


def test_options_reach_the_training(run: Run) -> None:
    document = json.loads(
        succeeded(
            run(
                *(
                    "train",
                    "iris",
                    "--hidden",
                    "6,5",
                    "--activation",
                    "tanh,gelu",
                    "--dtype",
                    "float64",
                    "--epochs",
                    40,
                ),
                *("--loss", "squared_error", "--output-function", "sigmoid", "--optimizer", "sgd", "--momentum", 0.9),
                *("--nesterov", "--learning-rate", 0.2, "--weight-decay", 0.001, "--clip-norm", 5, "--batch-size", 7),
                *("--patience", 3, "--held-out", 0.1, "--seed", 9, "--backend", "numpy", "--no-plot", "--json"),
                "--no-decay-biases",
            )
        ).out
    )
    network, training = document["network"], document["training"]
    assert network["sizes"] == [4, 6, 5, 3]
    assert network["activation"] == ["tanh", "gelu"]
    assert (network["dtype"], network["loss"], network["output"]) == ("float64", "squared_error", "sigmoid")
    assert training["optimizer"] == "SGD"
    assert (training["momentum"], training["nesterov"], training["learning_rate"]) == (0.9, True, 0.2)
    assert (training["weight_decay"], training["decay_biases"], training["seed"]) == (0.001, False, 9)
    assert document["samples"] == {"training": 135, "held_out": 15}
    assert training["steps"] == 16 * training["epochs"]  # 135 less a fifth, by sevens
    curve = document["curve"]
    assert len(curve["training"]) == len(curve["validation"]) == len(curve["held_out"]) == training["epochs"]
    assert document["backend"] == {"name": "numpy", "reason": "as asked for"}


def test_a_linear_model(run: Run, tmp_path: Path) -> None:
    succeeded(run("train", "iris", "--hidden", "none", "--epochs", 2, "--no-plot"))
    assert MLP.load(tmp_path / "iris.safetensors").sizes == (4, 3)


def test_binary_cross_entropy_has_one_output_for_two_classes(run: Run, tmp_path: Path) -> None:
    for name, width in (("breast_cancer", 1), ("iris", 3)):
        succeeded(run("train", name, "--loss", "binary_cross_entropy", "--epochs", 30, "--no-plot"))
        assert MLP.load(tmp_path / f"{name}.safetensors").sizes[-1] == width
        ran = run("predict", f"{name}.safetensors", name, "--score", "--proba")
        classes = datasets.load(name).target_names
        columns = columns_of(ran.out)
        assert list(columns) == ["target", *(f"p_{label}" for label in classes)]
        assert set(columns["target"]) == set(classes)
        assert float(ran.err.split()[1]) > 85.0


def test_whole_numbers_of_many_values_are_a_regression(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "years.csv"
    path.write_text("x,year\n" + "".join(f"{i / 10},{1900 + 2 * i}\n" for i in range(60)))
    ran = succeeded(run("train", path, "--epochs", 2, "--no-plot", "--task", "classification"))
    assert "year: 60 classes, 1900, 1902," in ran.out and "(as asked for)" in ran.out
    document = json.loads(succeeded(run("train", path, "--hidden", "none", "--epochs", 400, "--json")).out)
    assert document["task"] == "regression"
    assert document["held_out_score"]["r2"] > 0.999
    prediction = json.loads(run("predict", "years.safetensors", path, "--json").out)
    np.testing.assert_allclose(np.ravel(prediction["outputs"])[[0, 59]], [1900, 2018], atol=2)


def test_losses_of_quantities(run: Run, tmp_path: Path) -> None:
    """Counts are counts for poisson, however few values they have."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 200)
    path = tmp_path / "counts.csv"
    rows = zip(x, rng.poisson(np.exp(1 + 2 * x)), strict=True)
    path.write_text("x,n\n" + "".join(f"{a},{n}\n" for a, n in rows))
    for loss, output in [("poisson", "exponential"), ("huber", "identity"), ("quantile", "identity")]:
        source = path if loss == "poisson" else "diabetes"
        options = "--hidden", 8, "--epochs", 60, "--no-plot", "--json"
        document = json.loads(succeeded(run("train", source, "--loss", loss, *options)).out)
        network = document["network"]
        assert (document["task"], network["loss"], network["output"]) == ("regression", loss, output)
        assert document["held_out_score"]["r2"] > 0.25
    outputs = json.loads(succeeded(run("predict", "counts.safetensors", path, "--json")).out)["outputs"]
    assert np.ravel(outputs).min() > 0


def test_a_network_whose_loss_was_a_function(run: Run, tmp_path: Path) -> None:
    def pinball(y_hat: Any, y: Any) -> Any: ...

    MLP([4, 3], loss=pinball, seed=0).save(tmp_path / "net")
    assert list(columns_of(succeeded(run("predict", "net", "iris")).out)) == ["target0", "target1", "target2"]
    ran = run("check", "net")
    assert ran.code != 0 and "pinball" in ran.err


def test_quiet_says_nothing(run: Run) -> None:
    assert succeeded(run("train", "iris", "--epochs", 1, "-q", "--no-plot")) == (0, "", "")


def test_progress_goes_to_stderr(run: Run) -> None:
    ran = succeeded(run("train", "iris", "--epochs", 1, "--progress", "--json", "--no-plot"))
    assert "training" in ran.err
    assert ran.out.count("\n") == 1
    json.loads(ran.out)


def test_resuming_reaches_the_same_bits(run: Run, tmp_path: Path) -> None:
    def train(model: str, epochs: int, *options: object) -> Ran:
        return run("train", "iris", "--epochs", epochs, "--model", model, "--no-plot", *options)

    succeeded(train("whole", 6))
    succeeded(train("half", 3, "--checkpoint", "state", "--resume"))
    resumed = succeeded(train("resumed", 6, "--checkpoint", "state", "--resume"))
    assert "6 (12 steps), 3 in this run" in resumed.out
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    for other in (["--seed", 1], ["--no-standardize"], ["--held-out", 0.21], ["--patience", 5], ["--hidden", 9]):
        ran = train("other", 9, "--checkpoint", "state", "--resume", *other)
        assert_one_line(ran, USAGE)
        assert "another run" in ran.err
    assert not (tmp_path / "other").exists()


# files of data


def test_csv(run: Run, tmp_path: Path) -> None:
    x, y = small_csv(tmp_path / "things.csv")
    succeeded(run("train", "things.csv", "--target", "kind", "--epochs", 60))
    net, schema = MLP.load(tmp_path / "things.safetensors"), Schema.load(tmp_path / "things.safetensors")
    ran = succeeded(run("predict", "things.safetensors", "things.csv", "--score", "--proba"))
    columns = columns_of(ran.out)
    assert list(columns) == ["kind", "p_0", "p_1"]
    probabilities = np.array([columns["p_0"], columns["p_1"]], np.float32).T
    assert (probabilities == net.forward(schema.inputs(x))).all()
    assert (np.array(columns["kind"], int) == probabilities.argmax(axis=1)).all()
    accuracy = np.mean(probabilities.argmax(axis=1) == y)
    assert accuracy > 0.9
    assert ran.err == f"accuracy {100 * accuracy:.1f} % on 90 samples\n"

    features = tmp_path / "features.csv"
    features.write_text("mass,more,length,width\n" + "".join(f"{c!r},?,{a!r},{b!r}\n" for a, b, c in x.tolist()))
    assert succeeded(run("predict", "things.safetensors", features, "--proba")).out == ran.out
    succeeded(run("predict", "things.safetensors", features, "--proba", "-o", "answers.csv"))
    assert (tmp_path / "answers.csv").read_text() == ran.out
    features.write_text("mass,length\n1,2\n")
    ran = run("predict", "things.safetensors", features)
    assert_one_line(ran, USAGE)
    assert "none called 'width'" in ran.err


def test_a_network_without_a_schema_takes_columns_by_position(run: Run, tmp_path: Path) -> None:
    x, y = small_csv(tmp_path / "things.csv")
    net = MLP((3, 2), seed=0)
    net.save(tmp_path / "net")
    ran = succeeded(run("predict", "net", "things.csv", "--target", "kind", "--proba", "--score"))
    columns = columns_of(ran.out)
    assert list(columns) == ["kind", "p_0", "p_1"]
    assert (net.forward(x) == np.array([columns["p_0"], columns["p_1"]], np.float32).T).all()
    assert ran.err.startswith(f"accuracy {100 * np.mean(net.forward(x).argmax(axis=1) == y):.1f} %")
    assert_one_line(run("predict", "net", "things.csv", "--target", "kind", "--no-target"), USAGE)


def test_npz_with_several_targets(run: Run, tmp_path: Path) -> None:
    x = np.random.Generator(np.random.PCG64(1)).standard_normal((80, 4))
    y = np.stack((1000.0 + x[:, 0] - 2.0 * x[:, 1], 1e-3 * x[:, 2], 5.0 - x[:, 3]), axis=1)
    np.savez(tmp_path / "linear.npz", x=x, y=y)
    document = json.loads(succeeded(run("train", "linear.npz", "--hidden", "none", "--epochs", 600, "--json")).out)
    assert document["held_out_score"]["r2"] > 0.999
    ran = succeeded(run("predict", "linear.safetensors", "linear.npz", "--score"))
    columns = columns_of(ran.out)
    assert list(columns) == ["y0", "y1", "y2"]
    schema = Schema.load(tmp_path / "linear.safetensors")
    outputs = MLP.load(tmp_path / "linear.safetensors").forward(schema.inputs(x))
    assert (schema.answers(outputs) == np.array(list(columns.values()), np.float64).T).all()
    assert ran.err.startswith("R² 0.99") or ran.err.startswith("R² 1.00")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(run: Run, tmp_path: Path, end: str) -> None:
    digits = datasets.load("digits")
    images = (digits.x.reshape(-1, 8, 8)[:300] * 255).astype(np.uint8)
    datasets.write_idx(tmp_path / f"small-images-idx3-ubyte{end}", images)
    datasets.write_idx(tmp_path / f"small-labels-idx1-ubyte{end}", digits.y[:300].astype(np.uint8))
    succeeded(run("train", f"small-images-idx3-ubyte{end}", "--epochs", 20, "--model", "m", "--plot", "p.png"))
    (tmp_path / f"small-labels-idx1-ubyte{end}").rename(tmp_path / "labels")
    ran = succeeded(run("predict", "m", f"small-images-idx3-ubyte{end}", "--labels", "labels", "--score"))
    assert float(ran.err.split()[1]) > 90.0


# tables and what train does with them


def people(path: Path, rows: int = 60) -> None:
    """Writes numbers, a truth value, a text, weights and the answer, which follows from two of them."""
    lines = ["age;member;colour;w;bought"]
    for i in range(rows):
        age, colour = 18 + 7 * i % 50, ("red", "green", "blue")[i % 3]
        lines.append(f"{age},5;{i % 2 == 0};{colour};{1 + i % 2};{'yes' if age > 40 or colour == 'red' else 'no'}")
    path.write_text("\n".join(lines) + "\n")


def test_a_table_of_words(run: Run, tmp_path: Path) -> None:
    people(tmp_path / "a.csv")
    options = "--epochs", 60, "--sample-weight", "w", "--class-weight", "balanced", "--schedule", "cosine(warmup=5)"
    ran = succeeded(run("train", "a.csv", *options, "--report", "--plot", "curve.pdf"))
    for text in (
        *("a.csv (semicolons, decimal commas): classification", "bought: 2 classes, no, yes (texts)"),
        *("1 column of numbers", "truth values (member)", "one-hot inputs (colour: 3)", "6 → 128 → 2"),
        *("(a constant answer: ", "true \\ answered", "recall"),
    ):
        assert text in ran.out
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "b.csv").write_text("colour,member,age\npink,True,20\nred,False,20\n")
    assert succeeded(run("predict", "a.safetensors", "b.csv")).out.splitlines()[::2] == ["bought", "yes"]
    document = json.loads(succeeded(run("predict", "a.safetensors", "b.csv", "--json", "--proba")).out)
    assert document["classes"] == ["no", "yes"]
    assert np.shape(document["probabilities"]) == (2, 2)


def test_a_table_on_stdin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people(tmp_path / "a.csv")
    for command in (["train", "-", "--epochs", 1, "--no-plot", "-q"], ["predict", "stdin.safetensors", "-"]):
        with open(tmp_path / "a.csv") as file:
            monkeypatch.setattr(sys, "stdin", file)
            succeeded(run(*command))


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no /dev/stdin here")
@pytest.mark.thorough
def test_what_the_shell_opened_for_stdin_is_never_overwritten(tmp_path: Path) -> None:
    people(tmp_path / "a.csv")
    MLP((3, 2), seed=0).save(tmp_path / "net")
    before = (tmp_path / "a.csv").read_bytes()
    with open(tmp_path / "a.csv") as file:
        ran = start("predict", "net", "-", "-o", "a.csv", folder=tmp_path, stdin=file)
        assert "a.csv would be overwritten" in ran.communicate(timeout=60)[1]
    assert (tmp_path / "a.csv").read_bytes() == before


def test_missing_cells(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{i if i % 5 else ''},{i % 2}\n" for i in range(20)))
    ran = run("train", "a.csv", "--no-plot")
    assert_one_line(ran, USAGE)
    assert "'x' 4. Remedies: --missing mean fills in means, --missing drop leaves out the rows, --drop x" in ran.err
    assert (
        "4 rows with missing cells left out"
        in succeeded(run("train", "a.csv", "--no-plot", "--missing", "drop", "--epochs", 1)).out
    )
    assert_one_line(run("predict", "a.safetensors", "a.csv"), USAGE)
    ran = succeeded(run("predict", "a.safetensors", "a.csv", "--missing", "drop"))
    assert ran.out.count("\n") == 17
    assert ran.err == "gpuback: no answer for 4 rows with missing cells: 1, 6, 11, 16\n"
    assert succeeded(run("predict", "a.safetensors", "a.csv", "--missing", "mean")).out.count("\n") == 21
    assert (
        "4 missing cells filled in"
        in succeeded(run("train", "a.csv", "--no-plot", "--missing", "mean", "--epochs", 1)).out
    )


def test_other_data_to_test_on(run: Run, tmp_path: Path) -> None:
    people(tmp_path / "a.csv")
    people(tmp_path / "b.csv", rows=9)
    ran = succeeded(run("train", "a.csv", "--epochs", 1, "--no-plot", "--test", "b.csv"))
    assert "60 for training, 9 to test on, b.csv" in ran.out and "test accuracy" in ran.out
    assert_one_line(run("train", "a.csv", "--test", "b.csv", "--model", "b.csv"), USAGE)
    ran = succeeded(run("train", "a.csv", "--epochs", 1, "--no-plot", "--held-out", 0))
    assert "60 for training, none to test on" in ran.out and "training accuracy" in ran.out
    x, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2
    np.savez(tmp_path / "keras.npz", x_train=x, y_train=y, x_test=x[:7], y_test=y[:7])
    assert "7 to test on, x_test" in succeeded(run("train", "keras.npz", "--epochs", 1, "--no-plot")).out
    assert succeeded(run("predict", "keras.safetensors", "keras.npz")).out.count("\n") == 8


def test_the_loss_is_that_of_the_targets_own_units(run: Run, tmp_path: Path) -> None:
    """float32 has steps of 128 there, so that a loss of raw numbers would be 0 or far off."""
    x = np.linspace(-1, 1, 90)
    rows = [f"{a},{1.7e9 + 30 * np.sin(9 * a)}" for a in x.tolist()]
    (tmp_path / "far.csv").write_text("x,t\n" + "\n".join(rows) + "\n")
    document = json.loads(succeeded(run("train", "far.csv", "--epochs", 3, "--no-plot", "--held-out", 0, "--json")).out)
    answers = np.array(columns_of(succeeded(run("predict", "far.safetensors", "far.csv")).out)["t"], float)
    residual = answers - (1.7e9 + 30 * np.sin(9 * x))
    assert document["training_loss"] == pytest.approx(0.5 * np.mean(residual**2), rel=1e-4)
    assert document["training_score"]["rmse"] == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-4)


def test_training_goes_on_from_a_model(run: Run, tmp_path: Path) -> None:
    first = json.loads(succeeded(run("train", "wine", "--epochs", 20, "--no-plot", "--json")).out)
    again = ("train", "wine", "--from", "wine.safetensors", "--epochs", 1, "--learning-rate", 1e-5, "--no-plot")
    then = json.loads(succeeded(run(*again, "--json")).out)
    assert then["training_loss"] == pytest.approx(first["training_loss"], rel=0.01)
    assert then["network"] == first["network"]
    assert_one_line(run("train", "iris", "--from", "wine.safetensors"), USAGE)


def test_a_checkpoint_is_not_overwritten_unasked(run: Run, tmp_path: Path) -> None:
    train = "train", "iris", "--epochs", 1, "--no-plot", "-q", "--checkpoint", "state"
    succeeded(run(*train))
    before = (tmp_path / "state").read_bytes()
    ran = run(*train, "--seed", 1)
    assert_one_line(ran, USAGE)
    assert "--resume goes on from it, --overwrite replaces it" in ran.err
    assert "--overwrite" in run(*train, "--seed", 1, "--resume").err
    assert (tmp_path / "state").read_bytes() == before
    succeeded(run(*train, "--seed", 1, "--overwrite"))
    assert (tmp_path / "state").read_bytes() != before
    assert MLP.load(tmp_path / "state").sizes == (4, 128, 3)


def test_ctrl_c_after_an_epoch_keeps_the_network(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, kept = gpuback.fit, []

    def interrupted(net: MLP, *arguments: Any, callbacks: Any, **options: Any) -> Any:
        def interrupt(net: MLP, history: gpuback.History) -> None:
            if history.epochs == 2:
                kept.append(net.theta.copy())
                net.theta = 0 * net.theta  # as half a step would
                raise KeyboardInterrupt

        return fit(net, *arguments, callbacks=[*callbacks, interrupt], **options)

    monkeypatch.setattr(gpuback, "fit", interrupted)
    ran = run("train", "iris")
    assert (ran.code, ran.out) == (INTERRUPTED, "")
    assert "interrupted after epoch 2 of 50. The network so far is in iris.safetensors" in ran.err
    advice = "To go on: the same command with --from iris.safetensors, without the options of the network and the"
    assert ran.err.endswith(f"{advice} target\n")
    assert (MLP.load(tmp_path / "iris.safetensors").theta == kept[0]).all()
    assert os.listdir(tmp_path) == ["iris.safetensors"]


def test_a_loss_that_rises_for_long_is_hinted_at() -> None:
    assert tasks.risen_since([3.0, 1.0, *np.linspace(1.1, 2, 10)]) == 1
    assert tasks.risen_since([3.0, 1.0, *np.linspace(1.1, 2, 9)]) is None
    assert tasks.risen_since([3.0, 1.0, *np.linspace(1.0, 1.04, 40)]) is None
    assert tasks.risen_since([]) is None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("learning_rate: expected a number", "--learning-rate: expected a number"),
        ("Remedy: drop=['a b', 'c']", "Remedy: --drop 'a b' --drop c"),
        ("missing='mean' or max_bytes=…", "--missing mean or --max-bytes …"),
        ("another file, or resume=False", "another file, or --overwrite"),
        ("a smaller learning_rate, clip_norm=, or", "a smaller --learning-rate, --clip-norm, or"),
        ("/tmp/learning_rate.csv, column 'clip_norm'", "/tmp/learning_rate.csv, column 'clip_norm'"),
    ],
)
def test_errors_speak_of_options(message: str, said: str) -> None:
    names = ("learning_rate", "drop", "missing", "max_bytes", "clip_norm")
    assert words.in_options(message, {name: f"--{name.replace('_', '-')}" for name in names}) == said


# check and info


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--sizes", "4,3", "--loss", "squared_error", "--dtype", "float64", "--batch-size", 3, "--seed", 2),
        ("--activation", "gelu,tanh", "--loss", "squared_error", "--output-function", "softmax", "--dtype", "bfloat16"),
        ("--activation", "softplus(beta=5), hard_tanh(low=-2, high=2)"),
    ],
)
def test_check_passes(run: Run, options: tuple[object, ...]) -> None:
    ran = succeeded(run("check", *options))
    for block in ("W1", "b1", "inputs"):
        assert block in ran.out
    assert "FAILED" not in ran.out
    document = json.loads(succeeded(run("check", *options, "--json")).out)
    assert document["passed"] is True
    assert [block["block"] for block in document["blocks"]][:2] == ["W1", "b1"]


def test_check_of_a_saved_model(run: Run) -> None:
    MLP((3, 4, 2), activation="silu", seed=0).save("net")
    assert "W2" in succeeded(run("check", "net")).out
    assert_one_line(run("check", "net", "--sizes", "3,2"), USAGE)


def test_check_fails_where_a_gradient_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MLP.value_and_grad

    def wrong(self: MLP, *arguments: Any, **options: Any) -> Any:
        value, gradients = right(self, *arguments, **options)
        gradients.weights[1][...] *= 1.001
        return value, gradients

    monkeypatch.setattr(MLP, "value_and_grad", wrong)
    ran = run("check")
    assert ran.code == 1
    failed = [line.split()[0] for line in ran.out.splitlines() if line.endswith("FAILED")]
    assert failed == ["W2"]
    assert run("check", "--json").code == 1


def test_info(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas_kernels, "compare", lambda cpu, blas: Comparison({}, "mkl chooses its kernels itself"))
    ran = succeeded(run("info"))
    for text in (gpuback.__version__, np.__version__, "backend cupy", "logical cores", "BLAS kernel", "no: mkl"):
        assert text in ran.out
    document = json.loads(succeeded(run("info", "--json")).out)
    assert document["versions"]["numpy"] == np.__version__
    assert document["backends"]["numpy"]["available"] is True
    assert document["kernels"] == {
        "flops_per_second": {}, "fastest": None, "note": "mkl chooses its kernels itself",
    }  # fmt: skip
    assert document["advice"] is None

    zen_5 = machine.Cpu("AMD EPYC 9655", 4, 2, ("avx2", "avx512f"))
    blas = machine.Blas("openblas", "0.3.29", 4, "Haswell")
    found = machine.Machine({"gpuback": "0", "numpy": "2", "rich": None}, gpuback.backends(), zen_5, blas)
    monkeypatch.setattr(machine, "survey", lambda: found)
    rates = {"Haswell": 5e10, "SkylakeX": 9e10}
    monkeypatch.setattr(blas_kernels, "compare", lambda cpu, blas: Comparison(rates, "not kept"))
    ran = succeeded(run("info"))
    for text in (
        *("not installed (optional)", "2 of them usable", "Haswell 50.0, SkylakeX 90.0 GFLOP/s on one thread"),
        *("taken: SkylakeX", "not kept", "SkylakeX's are 80% faster", "OPENBLAS_CORETYPE=SkylakeX"),
    ):
        assert text in ran.out
    document = json.loads(succeeded(run("info", "--json")).out)
    assert document["kernels"] == {"flops_per_second": rates, "fastest": "SkylakeX", "note": "not kept"}
    assert "OPENBLAS_CORETYPE=SkylakeX" in document["advice"]


# what goes wrong


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("trian", "train"),
        ("train", "DATA"),
        ("train digit", "digits"),
        ("train nowhere/data.csv", "no file"),
        ("train iris --epoch 3", "--epochs"),
        ("train iris --epochs 0", "--epochs"),
        ("train iris --epochs many", "--epochs"),
        ("train iris --hidden 8,x", "--hidden"),
        ("train iris --hidden 0", "--hidden"),
        ("train iris --hidden 16777216,16777216", "memory"),
        ("train iris --activation rellu", "relu"),
        ("train iris --activation relu,tanh", "activation"),
        ("train iris --activation softplus(beta=-1)", "expected beta to be a number from"),
        ("train iris --loss hinge", "cross_entropy"),
        ("train iris --output-function tanh", "softmax"),
        ("train iris --dtype float8", "float16"),
        ("train iris --dtype float16 --allow-tf32", "float32"),
        ("train iris --dtype float64 --reproducible", "not with float64"),
        ("train iris --backend cupy", "cupy"),
        ("train iris --optimizer adamm", "adamw"),
        ("train iris --momentum 0.9", "sgd"),
        ("train iris --optimizer sgd --nesterov", "momentum"),
        ("train iris --no-decay-biases", "--weight-decay"),
        ("train iris --optimizer adamw --weight-decay 0 --no-decay-biases", "--weight-decay"),
        ("train iris --learning-rate -1", "--learning-rate: expected"),
        ("train iris --lr 0.1", "Did you mean --learning-rate?"),
        ("train iris --loss mse", "Did you mean 'squared_error'?"),
        ("train iris --activation swish", "Did you mean 'silu'?"),
        ("train iris --schedule cos", "Did you mean 'cosine'?"),
        ("train iris --schedule cosine(last=1)", "option of --schedule cosine 'last'"),
        ("train iris --task regression", "texts"),
        ("train iris --test iris --held-out 0.1", "--held-out"),
        ("train iris --separator ;", "--separator ';' does not apply to a built-in"),
        ("train diabetes --class-weight balanced", "--class-weight balanced is for classes"),
        ("train iris --overwrite", "--checkpoint"),
        ("train iris --plot curve.xyz", "'xyz'"),
        ("train iris --from net", "schema"),
        ("train iris --from net --hidden 3", "--hidden"),
        ("train iris --held-out 1", "--held-out"),
        ("train iris --held-out nan", "--held-out"),
        ("train iris --target species", "target"),
        ("train iris --resume", "--checkpoint"),
        ("train iris --plot a.png --no-plot", "--no-plot"),
        ("train iris --model .", "folder"),
        ("train iris --model no/such/folder", "folder"),
        ("train iris --model same --plot same", "same"),
        ("train diabetes --loss cross_entropy", "Remedies: --loss squared_error, or --task classification"),
        ("predict net", "DATA"),
        ("predict nothing iris", "nothing"),
        ("predict . iris", "."),
        ("predict net digits", "64"),
        ("predict net iris --score --no-target", "--score"),
        ("predict net iris -o no/such/folder", "folder"),
        ("check --sizes 5", "two"),
        ("check nothing", "nothing"),
        ("info --what", "--what"),
    ],
)
def test_bad_usage(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str) -> None:
    if "--backend cupy" in arguments and gpuback.backends()["cupy"].available:
        pytest.skip("CuPy works here")
    monkeypatch.chdir(tmp_path)
    MLP((4, 3), seed=0).save("net")
    ran = run(*arguments.split())
    assert_one_line(ran, USAGE)
    assert said in ran.err
    assert os.listdir(tmp_path) == ["net"]


def test_data_are_never_overwritten(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "things.csv"
    small_csv(path)
    content = path.read_bytes()
    for option in ("--model", "--plot", "--checkpoint"):
        assert_one_line(run("train", "things.csv", option, path), USAGE)
    assert path.read_bytes() == content


def test_labels_beside_images_are_never_overwritten(run: Run, tmp_path: Path) -> None:
    datasets.write_idx(tmp_path / "train-images-idx3-ubyte", np.ones((8, 2, 2), np.uint8))
    datasets.write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(8, dtype=np.uint8) % 2)
    content = (tmp_path / "train-labels-idx1-ubyte").read_bytes()
    assert_one_line(run("train", "train-images-idx3-ubyte", "--model", "train-labels-idx1-ubyte"), USAGE)
    assert (tmp_path / "train-labels-idx1-ubyte").read_bytes() == content


@pytest.mark.skipif(os.name != "posix", reason="links as POSIX has them")
@pytest.mark.parametrize("output", ["net", "things.csv", "soft", "hard"])
def test_predict_never_overwrites_what_it_reads(run: Run, tmp_path: Path, output: str) -> None:
    small_csv(tmp_path / "things.csv")
    MLP((3, 2), seed=0).save(tmp_path / "net")
    (tmp_path / "soft").symlink_to("net")
    (tmp_path / "hard").hardlink_to(tmp_path / "things.csv")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ran = run("predict", "net", "things.csv", "--target", "kind", "-o", output)
    assert_one_line(ran, USAGE)
    assert f"{output} would be overwritten" in ran.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_pipe_may_be_an_output(run: Run, tmp_path: Path) -> None:
    small_csv(tmp_path / "things.csv")
    MLP((3, 2), seed=0).save(tmp_path / "net")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        succeeded(run("predict", "net", "things.csv", "--target", "kind", "-o", "pipe"))
        assert os.read(reader, 1 << 16).startswith(b"kind\n")
        assert_one_line(run("train", "things.csv", "--target", "kind", "--checkpoint", "pipe"), USAGE)
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("option", ["--model", "--plot", "--checkpoint"])
def test_a_name_that_is_too_long_is_found_before_training(run: Run, tmp_path: Path, option: str) -> None:
    ran = run("train", "iris", option, "n" * 300)
    assert_one_line(ran, USAGE)
    assert f"{'n' * 300}: File name too long" in ran.err
    assert os.listdir(tmp_path) == []


def test_features_beyond_the_dtype(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "far.npz", x=1e4 * np.arange(12.0)[:, None], y=np.arange(12) % 2)
    ran = run("train", "far.npz", "--dtype", "float16", "--no-standardize")
    assert_one_line(ran, USAGE)
    assert "float16" in ran.err
    MLP((1, 2), dtype="float16", seed=0).save("net")
    assert_one_line(run("predict", "net", "far.npz"), USAGE)


def test_one_class_is_no_task(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.ones((5, 2)), y=np.zeros(5, int))
    assert_one_line(run("train", "one.npz"), USAGE)


def test_divergence(run: Run, tmp_path: Path) -> None:
    ran = run("train", "wine", "--learning-rate", "1e30")
    assert_one_line(ran, FAILED)
    assert "--learning-rate" in ran.err
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_no_half_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iris.safetensors").write_text("an earlier one")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_one_line(run("train", "iris", "--epochs", 1), USAGE)
    assert os.listdir(tmp_path) == ["iris.safetensors"]
    assert (tmp_path / "iris.safetensors").read_text() == "an earlier one"


def test_a_plot_that_fails_leaves_the_earlier_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iris.png").write_text("an earlier one")

    def fail(self: Figure, file: Any, **options: Any) -> None:
        file.write(PNG)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Figure, "savefig", fail)
    assert_one_line(run("train", "iris", "--epochs", 1), USAGE)
    assert sorted(os.listdir(tmp_path)) == ["iris.png", "iris.safetensors"]
    assert (tmp_path / "iris.png").read_text() == "an earlier one"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    ran = run("info")
    assert_one_line(ran, USAGE)
    assert missing in ran.err
    assert "pip install '.[cli]'" in ran.err


def test_without_matplotlib(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = succeeded(run("train", "iris", "--epochs", 1))
    assert "matplotlib" in ran.err
    assert os.listdir(tmp_path) == ["iris.safetensors"]
    assert_one_line(run("train", "iris", "--epochs", 1, "--plot", "curve.png"), USAGE)


def test_interruption(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpuback, "fit", interrupted)
    assert run("train", "iris") == (INTERRUPTED, "", "gpuback: interrupted\n")


# on terminals, in pipes


def test_help_and_version(run: Run) -> None:
    assert run("--version") == (0, f"gpuback {gpuback.__version__}\n", "")
    for arguments in ((), ("--help",), ("-h",)):
        ran = succeeded(run(*arguments))
        for command in ("train", "predict", "check", "info"):
            assert command in ran.out
    ran = succeeded(run("train", "--help"))
    for text in ("--hidden", "[default: (128)]", "Network", "Training", "--held-out"):
        assert text in ran.out


def test_tables_are_plain_off_terminals(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = succeeded(run("check"))
    assert "\x1b" not in ran.out
    assert "│" not in ran.out
    assert all(line == line.rstrip() for line in ran.out.splitlines())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "│" in run("check").out


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="signals and pipes as POSIX has them")
def test_ctrl_c_and_a_closed_pipe(tmp_path: Path) -> None:
    """Both at once, since processes take their time to start."""
    MLP((64, 10), seed=0).save(tmp_path / "net")
    training = start(
        *("train", "digits", "--epochs", "1000000", "--checkpoint", "state"),
        folder=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    predicting = start("predict", "net", "digits", folder=tmp_path)
    assert predicting.stdout is not None
    predicting.stdout.close()
    assert predicting.wait(60) == BROKEN_PIPE
    assert predicting.stderr is not None
    with predicting.stderr:
        assert predicting.stderr.read() == ""

    until = time.monotonic() + 60
    while not (tmp_path / "state").exists() and time.monotonic() < until:
        time.sleep(0.05)
    training.send_signal(signal.SIGINT)
    out, err = training.communicate(timeout=60)
    assert (out, training.returncode) == ("", INTERRUPTED)
    assert err.endswith("To go on: the same command with --checkpoint state --resume\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.safetensors", "net", "state"]
    MLP.load(tmp_path / "digits.safetensors")


def test_a_terminal_that_cannot_show_the_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert cli.main(["train", "iris", "--epochs", "1", "--no-plot"]) == 0
    assert b"4 ? 128 ? 3" in buffer.getvalue()
