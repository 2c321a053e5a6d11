"""Networks to measure, and the cases of each family with their least operations and least bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

DESCRIPTIONS = {
    "layer": "one layer's backward pass: dW, db and da_prev, ReLU below",
    "loss": "softmax + cross-entropy: value and da from logits and labels",
    "step": "a training step: forward, loss, backward, update",
    "fit": "training, from a fresh network to its last epoch",
    "reproducible": "a training step with reproducible=True",
    "busy": "a training step in quiet, and beside busy processes: the median and the 95th percentile of steps",
    "threads": "a training step by the number of threads",
    "host": "a call's time on the host, which does not wait for the GPU",
    "startup": "a fresh process: import, network, first step",
    "device-memory": "a GPU's memory for a batch, a network, its optimizer's state and three steps",
    "memory": "growth of a fresh process's peak resident memory from its imports and data to its third step",
}

LEARNING_RATES = {"SGD": 0.01, "Adam": 1e-3}
BETAS, EPS = (0.9, 0.999), 1e-3
"""Adam's. With an ε as large as gradients, the first steps depend on a gradient's length and not on its sign alone.
So a check sees a wrong gradient, and roundings around 0 do not matter. Times are the same for any ε."""

CHECKED_STEPS = 3
"""Steps from the beginning after which a contestant's θ is compared with the oracle's."""

LABEL_BYTES = 8

STEPS = ("step", "reproducible", "busy", "threads")
"""Families whose calls are single training steps."""


class LeftOutError(Exception):
    """A contestant does not take part in a case. The message says why."""


class CheckFailedError(LeftOutError):
    """A contestant's result is wrong. The message names the result and says how far off it is."""


@dataclass(frozen=True)
class Network:
    """Widths n_0, …, n_L of a network and a batch size."""

    name: str
    sizes: tuple[int, ...]
    batch_size: int


NETWORKS = {
    network.name: network
    for network in (
        Network("tiny", (64, 64, 64, 10), 64),
        Network("small", (784, 256, 128, 10), 128),
        Network("wide", (784, 1024, 1024, 1024, 10), 1024),
        Network("narrow-deep", (*[64] * 7, 10), 16384),
    )
}
MANY_CLASSES = Network("many classes", (64, 1000), 1024)
DIGITS = Network("digits", (64, 64, 10), 128)


def network(text: str) -> Network:
    """Look up a network of `NETWORKS` by name, or parse "784-256-10:512": widths and a batch size.

    Raises:
        ValueError: `text` is neither a name nor widths and a batch size.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    widths, colon, batch_size = text.partition(":")
    numbers = [*widths.split("-"), batch_size]
    if not colon or len(numbers) < 3 or not all(n.isascii() and n.isdecimal() and int(n) for n in numbers):
        raise ValueError(
            f"expected {', '.join(NETWORKS)} or widths and a batch size as in 784-256-10:512, got {text!r}"
        )
    return Network(text, tuple(map(int, numbers[:-1])), int(batch_size))


@dataclass(frozen=True)
class Case:
    """The work of one row.

    Attributes:
        name: name of the network, or of the part of a start.
        sizes: widths of the network; (n_in, n_out) for one layer, (n,) for a loss over n classes.
        optimizer: "SGD" or "Adam", where there are updates.
        samples, epochs: numbers of them in `fit`, else 0.
        unit: unit of the figures, "s" or "bytes".
        beside: busy processes that run meanwhile.
        percentile: which of the calls of a turn counts, in "busy".
        threads: threads that a contestant's process may have, in "threads".
    """

    family: str
    name: str
    sizes: tuple[int, ...]
    batch_size: int
    dtype: str = "float32"
    optimizer: str = ""
    samples: int = 0
    epochs: int = 0
    unit: str = "s"
    beside: int = 0
    percentile: int = 50
    threads: int = 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        return cls(**{**fields, "sizes": tuple(fields["sizes"])})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def word(self) -> int:
        """Bytes of a number."""
        return {"float64": 8, "bfloat16": 2, "float16": 2}.get(self.dtype, 4)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(nI, nO) of each layer."""
        return list(pairwise(self.sizes))

    @property
    def n_parameters(self) -> int:
        return sum(n_out * (n_in + 1) for n_in, n_out in self.layers)

    @property
    def label(self) -> str:
        """Sizes, batch size and optimizer, for people."""
        B = f"B = {self.batch_size}"
        if self.family == "layer":
            return f"{self.batch_size} × {self.sizes[1]} × {self.sizes[0]} (B × nO × nI)"
        if self.family == "loss":
            return f"{self.sizes[0]} classes, {B}"
        text = ", ".join(filter(None, ("-".join(map(str, self.sizes)), B, self.optimizer)))
        if self.family == "fit":
            return f"{text}, {self.samples} samples, {self.epochs} epochs"
        if self.family == "busy":
            beside = f"{self.beside} busy" if self.beside else "quiet"
            return f"{text}, {beside}, {'median' if self.percentile == 50 else f'{self.percentile}th percentile'}"
        if self.family == "threads":
            return f"{text}, {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{text}, {self.name}" if self.family == "startup" else text

    @property
    def flops(self) -> int:
        """Operations of matrix products, 2 for each multiply-add. The gradient of the first input does not count."""
        per_row = [2 * n_in * n_out for n_in, n_out in self.layers]
        if self.family == "layer":
            return 2 * self.batch_size * per_row[0]
        if self.family == "fit":
            return self.samples * self.epochs * (3 * sum(per_row) - per_row[0])
        if self.family in STEPS and self.family != "busy":
            return self.batch_size * (3 * sum(per_row) - per_row[0])
        return 0

    @property
    def bytes(self) -> int:
        """Least bytes: inputs read once, outputs written once. Hidden layers may stay in the cache and do not count.

        A step reads samples and labels, and reads and writes θ and the optimizer's moments.
        """
        B = self.batch_size
        if self.family == "layer":
            n_in, n_out = self.sizes
            total = max(self.word, 4)  # of dW and db
            return self.word * (B * (n_out + 2 * n_in) + n_out * n_in) + total * n_out * (n_in + 1)
        if self.family == "loss":
            return B * (2 * self.word * self.sizes[0] + LABEL_BYTES)
        state = (3 if self.optimizer == "Adam" else 1) * max(self.word, 4) * self.n_parameters
        if self.family in ("memory", "device-memory"):
            return state
        if self.family in ("startup", "host", "busy"):
            return 0
        samples = (self.samples or B) * (self.word * self.sizes[0] + LABEL_BYTES)
        steps = -(-self.samples // B) if self.samples else 1
        return (self.epochs or 1) * (samples + 2 * steps * state)
