"""The options by name, with their help texts; their defaults stand in the commands' signatures."""

from __future__ import annotations

import functools
from typing import Annotated, Any, TypeAlias

import typer

from gpuback._core.activation_families import examples
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.losses import LOSSES
from gpuback._core.precision import DTYPES
from gpuback._training.optimizers import OPTIMIZERS
from gpuback.datasets import BUILT_IN

DATA, NETWORK, TRAINING, OUTPUT = "Data", "Network", "Training", "Output"

LEARNING_RATES = {"adam": 3e-3, "adamw": 3e-3, "sgd": 0.05}
"""Chosen by a sweep with epochs and batch size, over ten seeds of the built-in sets, with a hidden layer of 128. Digits
reaches 97 % with nearly every seed, and no set loses more by overfitting than it gains by longer training."""

HIDDEN = "128"

CHECKED_SIZES = "5,7,6,3"
"""All widths differ, so that a transposed product shows."""


def option(*names: str, panel: str, help: str, default: str | bool = True, **more: Any) -> Any:
    """Make an option of one of the help's panels; `default` says in words what the signature's None stands for."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default, **more)


flag = functools.partial(option, metavar="")
data_option = functools.partial(option, panel=DATA)
network_option = functools.partial(option, panel=NETWORK, metavar="NAME")
training_option = functools.partial(option, panel=TRAINING)
file_option = functools.partial(option, panel=OUTPUT, metavar="FILE")

Source: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help=f"A built-in set ({', '.join(BUILT_IN)}) or a file: a table with a header row (.csv, .tsv, .txt,"
        " also .gz, .parquet), .npz with arrays x and y, or IDX images (MNIST's format); - for a table on stdin.",
        show_default=False,
    ),
]
Model: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="A network that `gpuback train` saved.", show_default=False)
]
OptionalModel: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A saved network, instead of a random one.", show_default=False),
]

Target: TypeAlias = Annotated[
    str | None,
    data_option("--target", metavar="COLUMN", help="The target's column of a table.", default="the last"),
]
PredictTarget: TypeAlias = Annotated[
    str | None,
    data_option("--target", metavar="COLUMN", help="For a network without a schema: the target's column of a table."),
]
NoTarget: TypeAlias = Annotated[
    bool, flag("--no-target", panel=DATA, help="For a network without a schema: every column is a feature.")
]
TaskName: TypeAlias = Annotated[
    str | None,
    data_option(
        "--task",
        metavar="TASK",
        help="classification or regression.",
        default="classification for texts, truth values and few whole numbers",
    ),
]
Drop: TypeAlias = Annotated[
    list[str] | None,
    data_option("--drop", metavar="COLUMN", help="A column of a table to leave out; may be given several times."),
]
Missing: TypeAlias = Annotated[
    str | None,
    data_option(
        "--missing",
        metavar="HOW",
        help="What to do about missing cells: mean fills in the mean of the input, drop leaves out the row.",
        default="an error",
    ),
]
Separator: TypeAlias = Annotated[
    str | None,
    data_option("--separator", metavar="CHARACTER", help="What divides the cells of a text file.", default="found out"),
]
Decimal: TypeAlias = Annotated[
    str | None,
    data_option("--decimal", metavar="CHARACTER", help="The decimal mark: . or a comma.", default="found out"),
]
Test: TypeAlias = Annotated[
    str | None, data_option("--test", metavar="FILE", help="Data to test on; then no part of DATA is held out.")
]
SampleWeight: TypeAlias = Annotated[
    str | None,
    data_option("--sample-weight", metavar="COLUMN", help="Weights of the samples' losses; no feature then."),
]
ClassWeight: TypeAlias = Annotated[
    str | None,
    data_option("--class-weight", metavar="NAME", help="balanced: every class counts alike, however few its samples."),
]
Labels: TypeAlias = Annotated[
    str | None,
    data_option("--labels", metavar="FILE", help="The labels of IDX images.", default="found beside them"),
]
MaxBytes: TypeAlias = Annotated[
    int | None,
    data_option(
        "--max-bytes",
        metavar="N",
        min=1,
        help="How much a compressed file may unpack to.",
        default="256 MiB or 20 times its size",
    ),
]
HeldOut: TypeAlias = Annotated[
    float | None,
    data_option("--held-out", metavar="FRACTION", help="Part of the data to test on; 0 for none.", default="0.2"),
]
Standardize: TypeAlias = Annotated[
    bool,
    flag(
        "--standardize/--no-standardize",
        panel=DATA,
        help="Train on features of mean 0 and standard deviation 1, and targets, in a regression. The model's file"
        " holds both, so that predict takes data as they are.",
    ),
]
Samples: TypeAlias = Annotated[int, data_option("--batch-size", metavar="N", min=1, help="Random samples to check on.")]
CheckSeed: TypeAlias = Annotated[int, data_option("--seed", metavar="N", min=0, help="Of the network and the samples.")]

Hidden: TypeAlias = Annotated[
    str | None,
    network_option("--hidden", metavar="WIDTHS", help="Hidden layers, such as 128,64; or none.", default=HIDDEN),
]
Sizes: TypeAlias = Annotated[
    str | None,
    network_option("--sizes", metavar="WIDTHS", help="Of the input, hidden layers and output.", default=CHECKED_SIZES),
]
Activation: TypeAlias = Annotated[
    str | None,
    network_option(
        "--activation",
        metavar="NAMES",
        help=f"One of {', '.join(ACTIVATIONS)}; one with constants, {', '.join(examples())}; or one for each hidden"
        " layer: relu,tanh.",
        default="relu",
    ),
]
Loss: TypeAlias = Annotated[
    str | None,
    network_option(
        "--loss",
        help=f"{', '.join(LOSSES)}. All but the first read classes as one-hot rows. For binary_cross_entropy two"
        " classes are one output, the probability of the second. For poisson, whole numbers are counts.",
        default="cross_entropy for classes, squared_error for quantities",
    ),
]
CheckLoss: TypeAlias = Annotated[
    str | None, network_option("--loss", help=f"{', '.join(LOSSES)}.", default="cross_entropy")
]
OutputFunction: TypeAlias = Annotated[
    str | None,
    network_option(
        "--output-function", help="softmax, sigmoid, identity, tanh or exponential.", default="what suits the loss"
    ),
]
Dtype: TypeAlias = Annotated[
    str | None,
    network_option("--dtype", help=f"Operands of products: {', '.join(DTYPES)}.", default="float32"),
]
AllowTf32: TypeAlias = Annotated[bool, flag("--allow-tf32", panel=NETWORK, help="Let float32 products use TF32.")]
Reproducible: TypeAlias = Annotated[
    bool,
    flag(
        "--reproducible",
        panel=NETWORK,
        help="The same bits on every backend, BLAS and GPU; takes several times as long.",
    ),
]
Backend: TypeAlias = Annotated[str, network_option("--backend", help="numpy, cupy, or auto: the fastest there is.")]

Epochs: TypeAlias = Annotated[
    int, training_option("--epochs", metavar="N", min=1, help="How often to go through the data.")
]
BatchSize: TypeAlias = Annotated[int, training_option("--batch-size", metavar="N", min=1, help="Samples per step.")]
OptimizerName: TypeAlias = Annotated[
    str, training_option("--optimizer", metavar="NAME", help=f"{', '.join(OPTIMIZERS)}.")
]
LearningRate: TypeAlias = Annotated[
    float | None,
    training_option(
        "--learning-rate",
        metavar="X",
        help="The step size.",
        default=", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items()),
    ),
]
Schedule: TypeAlias = Annotated[
    str | None,
    training_option(
        "--schedule",
        metavar="NAME",
        help="The learning rate over the run, from --learning-rate: cosine, falling to 0; step_decay, to a tenth every"
        " third of the steps; constant. With options: cosine(final=1e-4, warmup=100), step_decay(every=500,"
        " factor=0.5).",
        default="constant",
    ),
]
Momentum: TypeAlias = Annotated[float | None, training_option("--momentum", metavar="X", help="For sgd.", default="0")]
Nesterov: TypeAlias = Annotated[bool, flag("--nesterov", panel=TRAINING, help="For sgd with momentum.")]
WeightDecay: TypeAlias = Annotated[
    float | None,
    training_option("--weight-decay", metavar="X", help="λ of every parameter.", default="0, adamw 0.01"),
]
NoDecayBiases: TypeAlias = Annotated[
    bool, flag("--no-decay-biases", panel=TRAINING, help="Weight decay acts on weights, not on biases.")
]
ClipNorm: TypeAlias = Annotated[
    float | None,
    training_option("--clip-norm", metavar="X", help="Scale a longer gradient down to this length."),
]
Patience: TypeAlias = Annotated[
    int | None,
    training_option(
        "--patience",
        metavar="N",
        min=1,
        help="Stop when the loss on a fifth of the training samples, set aside for this, has not improved for so many"
        " epochs; keep the best epoch's network.",
    ),
]
Seed: TypeAlias = Annotated[
    int, training_option("--seed", metavar="N", min=0, help="Of the split, the weights and the order.")
]
Checkpoint: TypeAlias = Annotated[
    str | None, training_option("--checkpoint", metavar="FILE", help="Keep the state of the run in this file.")
]
Resume: TypeAlias = Annotated[bool, flag("--resume", panel=TRAINING, help="Go on from --checkpoint, if it exists.")]
Overwrite: TypeAlias = Annotated[
    bool, flag("--overwrite", panel=TRAINING, help="Begin anew where --checkpoint exists, and replace it.")
]
StartFrom: TypeAlias = Annotated[
    str | None,
    training_option(
        "--from", metavar="MODEL", help="Go on with the network and the schema of this file, which train has saved."
    ),
]

ModelFile: TypeAlias = Annotated[
    str | None, file_option("--model", help="Where to save the network.", default="DATA.safetensors")
]
Plot: TypeAlias = Annotated[
    str | None,
    file_option(
        "--plot", help="Where to draw the learning curve; the name says whether as PNG, PDF or SVG.", default="DATA.png"
    ),
]
NoPlot: TypeAlias = Annotated[bool, flag("--no-plot", panel=OUTPUT, help="Draw none.")]
Tensorboard: TypeAlias = Annotated[
    str | None,
    option("--tensorboard", panel=OUTPUT, metavar="FOLDER", help="Also write the learning curve for TensorBoard."),
]
Report: TypeAlias = Annotated[
    bool, flag("--report", panel=OUTPUT, help="Also print the confusion matrix, and the recall of each class.")
]
Proba: TypeAlias = Annotated[bool, flag("--proba", panel=OUTPUT, help="Also write the probability of each class.")]
Progress: TypeAlias = Annotated[
    bool | None,
    flag("--progress/--no-progress", panel=OUTPUT, help="A bar on stderr.", default="on a terminal"),
]
Quiet: TypeAlias = Annotated[bool, flag("--quiet", "-q", panel=OUTPUT, help="Print only warnings and errors.")]
Score: TypeAlias = Annotated[bool, flag("--score", panel=OUTPUT, help="Print accuracy or R² on all of DATA to stderr.")]
OutputFile: TypeAlias = Annotated[str | None, file_option("--output", "-o", help="Write there instead of to stdout.")]
ExportFile: TypeAlias = Annotated[
    str, typer.Argument(metavar="FILE", help="The ONNX file to write.", show_default=False)
]
Json: TypeAlias = Annotated[bool, flag("--json", panel=OUTPUT, help="Print one JSON document on stdout.")]
JsonInstead: TypeAlias = Annotated[bool, flag("--json", panel=OUTPUT, help="Write one JSON document instead of CSV.")]
