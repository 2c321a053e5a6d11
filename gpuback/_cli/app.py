"""The commands."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import gpuback
from gpuback import datasets
from gpuback._cli import FAILED, machine, report, show
from gpuback._cli import options as o
from gpuback._cli.predict import load, predict_for
from gpuback._cli.tasks import default_loss, is_regression, looks_like_regression
from gpuback._cli.train import Files, train_network
from gpuback._core.output_files import replacing, require_distinct, require_writable
from gpuback._text import shown
from gpuback._training.optimizers import OPTIMIZERS, Optimizer
from gpuback.errors import MissingExtraError, OptionError, unknown_name
from gpuback.testing import random_batch

MAX_WIDTH = 2**24
"""Beyond it two layers need more memory than NumPy can count."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def deferred(command: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    """Leave only the parsing to typer.

    The command runs when typer has returned, so that its errors, Ctrl-C and broken pipes reach `_cli.main.main` as
    they are.
    """

    @functools.wraps(command)
    def parsed(**options: Any) -> Callable[[], int | None]:
        return functools.partial(command, **options)

    return parsed


def show_version(wanted: bool) -> None:
    """Print the version, for the option --version."""
    if wanted:
        print(f"gpuback {gpuback.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train feed-forward networks by back-propagation: on NVIDIA GPUs and, with the same numbers, on NumPy."""


@app.command()
@deferred
def train(
    source: o.Source,
    target: o.Target = None,
    labels: o.Labels = None,
    max_bytes: o.MaxBytes = None,
    held_out: o.HeldOut = 0.2,
    standardize: o.Standardize = True,
    hidden: o.Hidden = "128",
    activation: o.Activation = None,
    loss: o.Loss = None,
    output_function: o.OutputFunction = None,
    dtype: o.Dtype = None,
    allow_tf32: o.AllowTf32 = False,
    reproducible: o.Reproducible = False,
    backend: o.Backend = "auto",
    epochs: o.Epochs = 50,
    batch_size: o.BatchSize = 64,
    optimizer: o.OptimizerName = "adam",
    learning_rate: o.LearningRate = None,
    momentum: o.Momentum = None,
    nesterov: o.Nesterov = False,
    weight_decay: o.WeightDecay = None,
    no_decay_biases: o.NoDecayBiases = False,
    clip_norm: o.ClipNorm = None,
    patience: o.Patience = None,
    seed: o.Seed = 0,
    checkpoint: o.Checkpoint = None,
    resume: o.Resume = False,
    model: o.ModelFile = None,
    plot: o.Plot = None,
    no_plot: o.NoPlot = False,
    progress: o.Progress = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Train a network on a data set, test it on samples held out, save it and draw its learning curve."""
    if resume and checkpoint is None:
        raise OptionError("--resume needs --checkpoint, the file to go on from")
    if plot is not None and no_plot:
        raise OptionError("--plot and --no-plot exclude each other")
    name = Path(source).stem
    curve = None if no_plot else plot or f"{name}.png"
    try:
        if curve is not None:
            show.require_matplotlib()
    except MissingExtraError as error:
        if plot is not None:
            raise
        warn(f"no learning curve is drawn: {error}")
        curve = None
    files = Files(model or f"{name}.safetensors", curve, checkpoint)
    files.check(datasets.files_of(source, labels))
    chosen_optimizer = make_optimizer(optimizer, learning_rate, momentum, nesterov, weight_decay, no_decay_biases)

    data = datasets.load(source, target=target, labels=labels, max_bytes=max_bytes)
    loss = loss or default_loss(data)
    if not is_regression(loss) and looks_like_regression(data):
        warn(f"{data.name} has {data.n_classes} classes; if they are quantities, --loss squared_error is for them")
    result = train_network(
        data,
        hidden=widths(hidden, "--hidden"),
        network={
            **given(activation=names(activation), output=output_function, dtype=dtype),
            "loss": loss,
            "allow_tf32": allow_tf32,
            "reproducible": reproducible,
            "backend": backend,
        },
        optimizer=chosen_optimizer,
        held_out=held_out,
        seed=seed,
        standardize=standardize,
        patience=patience,
        fit={
            "epochs": epochs,
            "batch_size": batch_size,
            "clip_norm": clip_norm,
            "checkpoint": checkpoint,
            "resume": resume,
            "progress": False if quiet else progress,
        },
        warn=warn,
    )
    result.net.save(files.model)
    if files.plot is not None:
        show.plot(files.plot, result)
    if as_json:
        show.print_json(report.train_document(result, backend, files, chosen_optimizer, seed))
    elif not quiet:
        show.print_table(report.train_rows(result, backend, files))


@app.command()
@deferred
def predict(
    model: o.Model,
    source: o.Source,
    target: o.Target = None,
    no_target: o.NoTarget = False,
    labels: o.Labels = None,
    max_bytes: o.MaxBytes = None,
    score: o.Score = False,
    output: o.OutputFile = None,
    as_json: o.JsonInstead = False,
) -> None:
    """Write a network's answers as CSV: label and probabilities for cross_entropy networks, else the outputs."""
    if score and no_target:
        raise OptionError("--score needs targets to compare with: leave out --no-target")
    if output is not None:
        require_writable(output)
        require_distinct([output], [model, *datasets.files_of(source, labels)])
    net = gpuback.MLP.load(model)
    data = load(source, target=target, labels=labels, no_target=no_target, max_bytes=max_bytes)
    answers = predict_for(net, data, score=score)
    text = show.json_line(answers.as_document()) if as_json else answers.as_csv()
    if output is None:
        show.print_data(text)
    else:
        with replacing(output) as file:
            file.write(text.encode())
    if answers.score is not None:
        print(f"{' '.join(show.score_text(answers.score))} on {len(data.x):,} samples", file=sys.stderr)


@app.command()
@deferred
def check(
    model: o.OptionalModel = None,
    sizes: o.Sizes = None,
    activation: o.Activation = None,
    loss: o.CheckLoss = None,
    output_function: o.OutputFunction = None,
    dtype: o.Dtype = None,
    batch_size: o.Samples = 32,
    seed: o.CheckSeed = 0,
    as_json: o.Json = False,
) -> int:
    """Check back-propagation against finite differences of the loss, on random data; exit code 1 if it fails."""
    described = given(activation=names(activation), output=output_function, loss=loss, dtype=dtype)
    if model is None:
        net = gpuback.MLP(widths(sizes or o.CHECKED_SIZES, "--sizes"), seed=seed, **described)
    elif described or sizes:
        raise OptionError("give either MODEL or what describes a random network, such as --sizes")
    else:
        net = gpuback.MLP.load(model)
    x, y = random_batch(net, batch_size, seed)
    result = gpuback.check_gradients(net, x, y, seed=seed)
    if as_json:
        show.print_json(report.check_document(net, result))
    else:
        show.print_table(report.check_rows(result), header=report.CHECK_HEADER, right=(1, 2, 3, 4))
        print(f"{'passed' if result.passed else 'FAILED'} on {result.samples} samples")
    return 0 if result.passed else FAILED


@app.command()
@deferred
def info(as_json: o.Json = False) -> None:
    """Show versions, backends and why each can or cannot be used, the processor, and the BLAS under NumPy."""
    found = machine.survey()
    if as_json:
        show.print_json(report.info_document(found))
        return
    show.print_table(report.info_rows(found))
    if found.advice is not None:
        print(found.advice)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    print(f"gpuback: {shown(line)}", file=sys.stderr)


def widths(text: str, option: str) -> tuple[int, ...]:
    """Read the widths in "128,64"; none in "none"."""
    if text.strip().lower() == "none":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= MAX_WIDTH for part in parts):
        raise OptionError(f"{option}: expected widths from 1 to {MAX_WIDTH:,}, such as 128,64, got {text!r}")
    return tuple(map(int, parts))


def names(text: str | None) -> str | list[str] | None:
    """Read the names in "relu,hard_tanh(low=-2, high=2)"; return "relu" itself."""
    found = re.split(r",(?![^()]*\))", text or "")
    return [name.strip() for name in found] if len(found) > 1 else text


def given(**options: Any) -> dict[str, Any]:
    """Drop the options that are None, so that the callee's defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def make_optimizer(
    name: str,
    learning_rate: float | None,
    momentum: float | None,
    nesterov: bool,
    weight_decay: float | None,
    no_decay_biases: bool,
) -> Optimizer:
    """Make the optimizer of that name; None stands for its own default.

    Raises:
        OptionError: an unknown name, a hyper-parameter that it does not have, or one that changes nothing.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    only_for_sgd = given(momentum=momentum, nesterov=nesterov or None)
    if only_for_sgd and name != "sgd":
        raise OptionError(f"--{next(iter(only_for_sgd))} goes with --optimizer sgd, not with {name}")
    if no_decay_biases and not (name == "adamw" if weight_decay is None else weight_decay):
        raise OptionError(
            "--no-decay-biases needs a weight decay above 0: give --weight-decay, or --optimizer adamw without it"
        )
    rate = o.LEARNING_RATES[name] if learning_rate is None else learning_rate
    return OPTIMIZERS[name](rate, **only_for_sgd, **given(weight_decay=weight_decay), decay_biases=not no_decay_biases)
