"""The commands."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import gpuback
from gpuback._cli import FAILED, INTERRUPTED, blas_kernels, machine, report, show
from gpuback._cli import options as o
from gpuback._cli.arguments import (
    curve_file,
    given,
    make_optimizer,
    make_schedule,
    names,
    require_checkpoint,
    tensorboard_logger,
    widths,
)
from gpuback._cli.models import load_model
from gpuback._cli.predict import predict_for, schema_for
from gpuback._cli.samples import DataOptions, load_samples
from gpuback._cli.tasks import default_loss
from gpuback._cli.train import Files, network_for, require_fitting, train_network, training_rows
from gpuback._core.output_files import replacing, require_distinct, require_writable
from gpuback._text import listed, shown
from gpuback.datasets import sources
from gpuback.datasets.frames import STDIN
from gpuback.datasets.standardization import fold
from gpuback.errors import OptionError
from gpuback.testing import random_batch

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
    task: o.TaskName = None,
    drop: o.Drop = None,
    missing: o.Missing = None,
    separator: o.Separator = None,
    decimal: o.Decimal = None,
    labels: o.Labels = None,
    max_bytes: o.MaxBytes = None,
    held_out: o.HeldOut = None,
    test: o.Test = None,
    sample_weight: o.SampleWeight = None,
    class_weight: o.ClassWeight = None,
    standardize: o.Standardize = True,
    hidden: o.Hidden = None,
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
    schedule: o.Schedule = None,
    momentum: o.Momentum = None,
    nesterov: o.Nesterov = False,
    weight_decay: o.WeightDecay = None,
    no_decay_biases: o.NoDecayBiases = False,
    clip_norm: o.ClipNorm = None,
    patience: o.Patience = None,
    seed: o.Seed = 0,
    start_from: o.StartFrom = None,
    checkpoint: o.Checkpoint = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    model: o.ModelFile = None,
    plot: o.Plot = None,
    no_plot: o.NoPlot = False,
    tensorboard: o.Tensorboard = None,
    full_report: o.Report = False,
    progress: o.Progress = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> int:
    """Train a network on a data set, test it on samples held out, save it and draw its learning curve."""
    require_checkpoint(checkpoint, resume, overwrite)
    if plot is not None and no_plot:
        raise OptionError("--plot and --no-plot exclude each other")
    read = [*sources.files_of(source, labels), *(sources.files_of(test) if test is not None else [])]
    if backend == "numpy" or not gpuback.backends()["cupy"].available:
        blas_kernels.use_fastest(read, epochs, (*widths(hidden or o.HIDDEN, "--hidden"), 1)[0])
    name = "stdin" if source == STDIN else Path(source.removesuffix(".gz")).stem
    files = Files(model or f"{name}.safetensors", curve_file(plot, f"{name}.png", no_plot, warn), checkpoint)
    files.check(read)
    chosen_optimizer = make_optimizer(optimizer, learning_rate, momentum, nesterov, weight_decay, no_decay_biases)
    network = given(
        activation=names(activation),
        loss=loss,
        output=output_function,
        dtype=dtype,
        allow_tf32=allow_tf32 or None,
        reproducible=reproducible or None,
    )
    start = None
    if start_from is not None:
        if not standardize:
            raise OptionError("--from takes the standardization from the file: leave out --no-standardize")
        if others := given(hidden=hidden, **network, target=target, task=task, drop=drop or None):
            raise OptionError(f"--from takes network and schema from the file: leave out {next(iter(others))}=")
        start = load_model(start_from, backend)
        loss, output_function = start.net.architecture.loss, start.net.architecture.output
        dtype = start.net.architecture.precision.name

    samples = load_samples(
        source,
        DataOptions(
            *(target, labels, task, drop or (), missing, separator, decimal, max_bytes, test, held_out),
            *(sample_weight, class_weight, standardize, seed),
        ),
        loss=loss,
        output=output_function,
        dtype=dtype,
        schema=None if start is None else start.required_schema,
    )
    for line in samples.warnings:
        warn(line)
    network["loss"] = loss or default_loss(samples.schema.task)
    if start is None:
        net = network_for(samples, widths(hidden or o.HIDDEN, "--hidden"), seed=seed, **network, backend=backend)
    else:
        net = start.net
        require_fitting(net, samples)
    steps = epochs * -(-training_rows(samples, patience) // batch_size)
    callbacks = [] if tensorboard is None else [tensorboard_logger(tensorboard)]
    result = train_network(
        samples,
        net,
        optimizer=chosen_optimizer,
        seed=seed,
        patience=patience,
        callbacks=callbacks,
        fit={
            "epochs": epochs,
            "batch_size": batch_size,
            "schedule": make_schedule(schedule, chosen_optimizer.learning_rate, steps),
            "clip_norm": clip_norm,
            "checkpoint": checkpoint,
            "resume": resume,
            "progress": False if quiet else progress,
        },
    )
    net.save(files.model, schema=samples.schema)
    if result.interrupted:
        again = f"the same command with --from {files.model}, without the options of the network and the target"
        if checkpoint:
            again = f"the same command with --checkpoint {checkpoint} --resume"
        warn(
            f"interrupted after epoch {result.history.epochs} of {epochs}. The network so far is in {files.model}."
            f" To go on: {again}"
        )
        return INTERRUPTED
    if files.plot is not None:
        show.plot(files.plot, result)
    if as_json:
        show.print_json(report.train_document(result, backend, files, chosen_optimizer, seed))
    elif not quiet:
        show.print_table(report.train_rows(result, backend, files))
        if full_report:
            show.print_confusion(samples.schema, result.score)
    if not quiet:
        for line in report.hints(result, patience):
            warn(line)
    return 0


@app.command()
@deferred
def predict(
    model: o.Model,
    source: o.Source,
    target: o.PredictTarget = None,
    no_target: o.NoTarget = False,
    missing: o.Missing = None,
    separator: o.Separator = None,
    decimal: o.Decimal = None,
    labels: o.Labels = None,
    max_bytes: o.MaxBytes = None,
    proba: o.Proba = False,
    score: o.Score = False,
    output: o.OutputFile = None,
    as_json: o.JsonInstead = False,
) -> None:
    """Write a network's answers as CSV: classes by name, or quantities."""
    if score and no_target:
        raise OptionError("--score needs targets to compare with: leave out --no-target")
    if output is not None:
        require_writable(output)
        require_distinct([output], [model, *sources.files_of(source, labels)])
    loaded = load_model(model)
    texts = () if loaded.schema is None else loaded.schema.texts
    table = sources.read(
        *(source,), labels=labels, separator=separator, decimal=decimal, max_bytes=max_bytes, texts=texts
    )
    table = table.test or table  # of Keras's four arrays
    schema = schema_for(loaded.net, loaded.schema, table, target, no_target)
    answers = predict_for(loaded.net, schema, table, missing=missing, probabilities=proba, score=score)
    text = show.json_line(answers.as_document()) if as_json else answers.as_csv()
    if output is None:
        show.print_data(text)
    else:
        with replacing(output) as file:
            file.write(text.encode(errors="backslashreplace"))
    if answers.left_out:
        warn(f"no answer for {len(answers.left_out):,} rows with missing cells: {listed(answers.left_out)}")
    if answers.score is not None:
        print(f"{' '.join(show.score_text(answers.score))} on {len(answers.answers):,} samples", file=sys.stderr)


@app.command()
@deferred
def export(model: o.Model, output: o.ExportFile) -> None:
    """Write a network as an ONNX file, which takes a schema's inputs before they are standardized."""
    from gpuback.onnx import to_onnx

    require_distinct([output], [model])
    loaded = load_model(model, "numpy")
    if loaded.schema is not None:
        fold(loaded.net, loaded.schema.features, loaded.schema.outputs)
    to_onnx(loaded.net, output)
    show.print_table(report.export_rows(loaded, output))


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
    kernels = blas_kernels.compare(found.cpu, found.blas)
    if as_json:
        show.print_json(report.info_document(found, kernels))
        return
    show.print_table(report.info_rows(found, kernels))
    advice = blas_kernels.advice_for(kernels)
    if advice is not None:
        print(advice)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    print(f"gpuback: {shown(line)}", file=sys.stderr)
