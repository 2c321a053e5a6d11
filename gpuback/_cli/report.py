"""Results as rows of a table and as JSON documents."""

from __future__ import annotations

from typing import Any

import gpuback
from gpuback._cli.blas_kernels import Comparison, advice_for
from gpuback._cli.machine import OPTIONAL, Machine
from gpuback._cli.show import score_text
from gpuback._cli.train import Files, Result
from gpuback._network.gradient_check import FORMULA_LIMIT, GradientReport
from gpuback._training.optimizers import Optimizer
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
    net, history, data = result.net, result.history, result.data
    architecture = net.architecture
    chain = " → ".join(f"{size:,}" for size in net.sizes)
    functions = ", ".join((*dict.fromkeys(architecture.activations), architecture.output))
    metric, value = score_text(result.score)
    classes = f", {data.n_classes} classes" if result.kind == "classification" else ""
    steps = f"{history.steps:,} {'steps' if history.steps != 1 else 'step'}"
    resumed = "" if len(result.held_out_curve) == history.epochs else f", {len(result.held_out_curve)} in this run"
    kept = "" if history.best_epoch is None else f", the best of which was {history.best_epoch + 1} and is kept"
    per_step = "" if result.seconds_per_step is None else f", {1e3 * result.seconds_per_step:.3g} ms a step"
    rows = [
        ("data", f"{data.name}: {result.kind}{classes}"),
        ("samples", f"{result.n_training:,} for training, {result.n_held_out:,} held out"),
        ("network", f"{chain}; {functions}; {architecture.loss}; {architecture.precision.name}"),
        ("parameters", f"{net.n_parameters:,}"),
        ("training loss", f"{result.training_loss:.4g}"),
        ("held-out loss", f"{result.held_out_loss:.4g}"),
        (f"held-out {metric}", value),
        ("epochs", f"{history.epochs} ({steps}){resumed}{kept}"),
        ("time", f"{history.seconds:.3g} s{per_step}"),
        ("backend", f"{net.backend} ({backend_reason(backend, net.backend)})"),
        ("model", files.model),
    ]
    rows += [("fingerprint of θ", fingerprint(net))] if architecture.precision.reproducible else []
    rows += [("learning curve", files.plot)] if files.plot else []
    rows += [("checkpoint", files.checkpoint)] if files.checkpoint else []
    return [*rows]


def train_document(result: Result, backend: str, files: Files, optimizer: Optimizer, seed: int) -> dict[str, Any]:
    """Make the JSON document of a training run, which says more than the table."""
    net, history = result.net, result.history
    return {
        "gpuback": gpuback.__version__,
        "data": result.data.name,
        "task": result.kind,
        "samples": {"training": result.n_training, "held_out": result.n_held_out},
        "network": {**net.architecture.as_options(), "parameters": net.n_parameters},
        "fingerprint": fingerprint(net),
        "training": {**optimizer._options(), "seed": seed, "epochs": history.epochs, "steps": history.steps},
        "training_loss": result.training_loss,
        "held_out_loss": result.held_out_loss,
        "held_out_score": result.score.as_document(),
        "seconds": history.seconds,
        "seconds_per_step": result.seconds_per_step,
        "backend": {"name": net.backend, "reason": backend_reason(backend, net.backend)},
        "curve": {
            "standardized_targets": result.standardized_targets,
            "training": history.loss,
            "validation": history.validation_loss,
            "held_out": result.held_out_curve,
        },
        "files": {"model": files.model, "plot": files.plot, "checkpoint": files.checkpoint},
    }


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
