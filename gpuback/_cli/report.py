"""Results as rows of a table and as JSON documents."""

from __future__ import annotations

from typing import Any

import numpy as np

import gpuback
from gpuback._cli.blas_kernels import Comparison, advice_for
from gpuback._cli.machine import OPTIONAL, Machine
from gpuback._cli.models import Model
from gpuback._cli.samples import HELD_OUT_WORDS, Samples
from gpuback._cli.show import score_text
from gpuback._cli.tasks import Score, risen_since
from gpuback._cli.train import Files, Result
from gpuback._network.gradient_check import FORMULA_LIMIT, GradientReport
from gpuback._text import listed
from gpuback._training.optimizers import Optimizer
from gpuback.datasets.columns import BOOLEAN, CATEGORY, NUMBER
from gpuback.datasets.schema import Schema
from gpuback.datasets.targets import REGRESSION
from gpuback.testing import fingerprint

Rows = list[tuple[str, ...]]


def backend_reason(asked_for: str, used: str) -> str:
    """Explain the choice of a network's backend."""
    if asked_for != "auto":
        return "as asked for"
    others = [
        f"{name} cannot be used: {status.reason}"
        for name, status in gpuback.backends().items()
        if name != used and not status.available
    ]
    return "; ".join(others) or "the fastest that this machine has"


def train_rows(result: Result, backend: str, files: Files) -> Rows:
    """Make the table of a training run."""
    net, history, samples = result.net, result.history, result.samples
    architecture = net.architecture
    chain = " → ".join(f"{size:,}" for size in net.sizes)
    functions = ", ".join((*dict.fromkeys(architecture.activations), architecture.output))
    steps = f"{history.steps:,} {'steps' if history.steps != 1 else 'step'}"
    resumed = "" if result.epochs == history.epochs else f", {result.epochs} in this run"
    kept = "" if history.best_epoch is None else f", the best of which was {history.best_epoch + 1} and is kept"
    per_step = "" if result.seconds_per_step is None else f", {1e3 * result.seconds_per_step:.3g} ms a step"
    layout = f" ({samples.schema.layout})" if samples.schema.layout else ""
    tested = "none to test on" if samples.test is None else f"{len(samples.test):,} to test on"
    if samples.tested_on == HELD_OUT_WORDS and samples.test is not None:
        tested = f"{len(samples.test):,} held out"
    elif samples.test is not None:
        tested += f", {samples.tested_on}"
    rows: Rows = [
        ("data", f"{samples.name}{layout}: {samples.schema.task}"),
        ("target", target_text(samples.schema)),
        ("features", features_text(samples.schema)),
        ("samples", "; ".join((f"{len(samples.training):,} for training, {tested}", *samples.notes))),
        ("network", f"{chain}; {functions}; {architecture.loss}; {architecture.precision.name}"),
        ("parameters", f"{net.n_parameters:,}"),
        ("training loss", f"{result.training_loss:.4g}"),
    ]
    rows += [] if result.test_loss is None else [(f"{_part(samples)} loss", f"{result.test_loss:.4g}")]
    rows += _score_rows(_part(samples), result.score)
    rows += [
        ("epochs", f"{history.epochs} ({steps}){resumed}{kept}"),
        ("time", f"{history.seconds:.3g} s{per_step}"),
        ("backend", f"{net.backend} ({backend_reason(backend, net.backend)})"),
        ("model", files.model),
    ]
    rows += [("fingerprint of θ", fingerprint(net))] if architecture.precision.reproducible else []
    rows += [("learning curve", files.plot)] if files.plot else []
    rows += [("checkpoint", files.checkpoint)] if files.checkpoint else []
    return [*rows]


def _part(samples: Samples) -> str:
    """Return what the samples of the score are called."""
    if samples.test is None:
        return "training"
    return "held-out" if samples.tested_on == HELD_OUT_WORDS else "test"


def _score_rows(part: str, score: Score) -> Rows:
    name, value = score_text(score)
    if score.error is None:
        return [(f"{part} {name}", f"{value} (a constant answer: {100 * (score.constant or 0):.1f} %)")]
    error, spread = score.error
    return [(f"{part} {name}", value), (f"{part} RMSE", f"{error:.4g} (a constant answer: {spread:.4g})")]


def target_text(schema: Schema) -> str:
    """Say what the target is, and why."""
    target = schema.target
    why = f" ({target.reason})" if target.reason else ""
    if target.task == REGRESSION:
        return f"{target.name}: a quantity{why}"
    return f"{target.name}: {len(target.classes)} classes, {listed(target.classes, 6)}{why}"


def features_text(schema: Schema) -> str:
    """Say what the features' columns hold."""
    counted = []
    numbers = sum(column.kind == NUMBER for column in schema.columns)
    if numbers:
        counted.append(f"{numbers:,} {'column' if numbers == 1 else 'columns'} of numbers")
    truths = [column.name for column in schema.columns if column.kind == BOOLEAN]
    if truths:
        counted.append(f"truth values ({listed(truths, 6)})")
    texts = [f"{column.name}: {len(column.values)}" for column in schema.columns if column.kind == CATEGORY]
    if texts:
        counted.append(f"texts as one-hot inputs ({listed(texts, 6)})")
    constant = int(np.isinf(schema.features.scale).sum()) - len(texts)
    if constant:
        counted.append(f"{constant:,} of them constant and without effect")
    return ", ".join(counted)


def hints(result: Result, patience: int | None) -> list[str]:
    """Return what the user could do better."""
    best = risen_since(result.test_curve)
    if best is None or patience is not None:
        return []
    epoch = result.history.epochs - len(result.test_curve) + best + 1
    lowest, last = result.test_curve[best], result.test_curve[-1]
    return [
        f"the loss on samples not trained on has risen since epoch {epoch}, from {lowest:.3g} to {last:.3g}: --patience"
        f" 10 stops in time, or --epochs {epoch}"
    ]


def train_document(result: Result, backend: str, files: Files, optimizer: Optimizer, seed: int) -> dict[str, Any]:
    """Make the JSON document of a training run, which says more than the table."""
    net, history, samples = result.net, result.history, result.samples
    score = result.score.as_document()
    confusion = result.score.confusion
    return {
        "gpuback": gpuback.__version__,
        "data": samples.name,
        "task": samples.schema.task,
        "target": {"name": samples.schema.target.name, "classes": list(samples.schema.classes)},
        "columns": [[column.name, column.kind] for column in samples.schema.columns] if samples.schema.named else None,
        "notes": list(samples.notes),
        "samples": {"training": len(samples.training), "held_out": 0 if samples.test is None else len(samples.test)},
        "network": {**net.architecture.as_options(), "parameters": net.n_parameters},
        "fingerprint": fingerprint(net),
        "training": {**optimizer._options(), "seed": seed, "epochs": history.epochs, "steps": history.steps},
        "training_loss": result.training_loss,
        "held_out_loss": result.test_loss,
        "held_out_score": None if samples.test is None else score,
        "training_score": score if samples.test is None else None,
        "confusion": None if confusion is None else confusion.tolist(),
        "seconds": history.seconds,
        "seconds_per_step": result.seconds_per_step,
        "backend": {"name": net.backend, "reason": backend_reason(backend, net.backend)},
        "curve": {
            "standardized_targets": samples.schema.outputs is not None,
            "training": history.loss,
            "validation": history.validation_loss,
            "held_out": result.test_curve,
        },
        "files": {"model": files.model, "plot": files.plot, "checkpoint": files.checkpoint},
    }


def export_rows(model: Model, output: str) -> Rows:
    """Make the table of an export: what goes in and what comes out, in order."""
    sizes, schema = model.net.sizes, model.schema
    inputs = listed(schema.input_names, 100) if schema is not None and schema.named else "as the model's"
    answers = "as the model's"
    if schema is not None:
        answers = listed(schema.classes, 100) if schema.classes else schema.target.name
        if schema.classes and sizes[-1] == 1:
            answers = f"the probability of {schema.classes[1]}"
    return [
        ("ONNX file", output),
        ("x", f"(batch, {sizes[0]:,}): {inputs}"),
        ("y", f"(batch, {sizes[-1]:,}): {answers}"),
    ]


def check_rows(report: GradientReport) -> Rows:
    """Make the table of a gradient check."""
    return [
        (
            row.block,
            f"{row.formula_error:.1e}",
            f"{FORMULA_LIMIT:.0e}",
            f"{row.rounding_error:.1e}",
            f"{row.rounding_limit:.0e}",
            "passed" if row.passed else "FAILED",
        )
        for row in report.rows
    ]


CHECK_HEADER = ("block", "formula error", "limit", "rounding error", "limit", "")


def check_document(net: gpuback.MLP, report: GradientReport) -> dict[str, Any]:
    """Make the JSON document of a gradient check."""
    return {
        "network": net.architecture.as_options(),
        "passed": report.passed,
        "samples": report.samples,
        "formula_limit": FORMULA_LIMIT,
        "blocks": [
            {
                "block": row.block,
                "formula_error": row.formula_error,
                "rounding_error": row.rounding_error,
                "rounding_limit": row.rounding_limit,
                "passed": row.passed,
            }
            for row in report.rows
        ],
    }


def info_rows(machine: Machine, kernels: Comparison) -> Rows:
    """Make the table of `gpuback info`."""
    cpu, blas = machine.cpu, machine.blas
    missing = {True: "not installed (optional)", False: "not installed"}
    unknown = "unknown to threadpoolctl"
    rows = [(name, version or missing[name in OPTIONAL]) for name, version in machine.versions.items()]
    rows += [
        (f"backend {name}", f"{'can' if status.available else 'cannot'} be used: {status.reason}")
        for name, status in machine.backends.items()
    ]
    usable = "" if cpu.usable_cores == cpu.cores else f", {cpu.usable_cores} of them usable by this process"
    rows += [
        ("CPU", cpu.model),
        ("logical cores", f"{cpu.cores}{usable}"),
        ("SIMD", " ".join(cpu.simd) or "unknown"),
        ("BLAS", f"{blas.library or 'unknown'} {blas.version or ''}".rstrip()),
        ("BLAS threads", str(blas.threads or unknown)),
        ("BLAS kernel", blas.kernel or unknown),
        ("kernels compared", _compared(kernels)),
    ]
    return [*rows]


def _compared(kernels: Comparison) -> str:
    if not kernels.rates:
        return f"no: {kernels.note}"
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in kernels.rates.items())
    return "; ".join(filter(None, (f"{rates} GFLOP/s on one thread", f"taken: {kernels.fastest}", kernels.note)))


def info_document(machine: Machine, kernels: Comparison) -> dict[str, Any]:
    """Make the JSON document of `gpuback info`; null stands for what is unknown or not installed."""
    cpu, blas = machine.cpu, machine.blas
    return {
        "versions": dict(machine.versions),
        "backends": {name: status._asdict() for name, status in machine.backends.items()},
        "cpu": {
            "model": cpu.model,
            "logical_cores": cpu.cores,
            "usable_cores": cpu.usable_cores,
            "simd": list(cpu.simd),
        },
        "blas": {"library": blas.library, "version": blas.version, "threads": blas.threads, "kernel": blas.kernel},
        "kernels": {"flops_per_second": dict(kernels.rates), "fastest": kernels.fastest, "note": kernels.note or None},
        "advice": advice_for(kernels),
    }
