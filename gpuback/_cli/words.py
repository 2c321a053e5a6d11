"""Errors in the command line's words: the library says drop=['age'], a user of the command line types --drop age."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping

SYNONYMS = {
    **{"lr": "learning-rate", "rate": "learning-rate", "batch": "batch-size", "bs": "batch-size"},
    **{"layers": "hidden", "units": "hidden", "hidden-layers": "hidden", "output-activation": "output-function"},
    **{"l2": "weight-decay", "alpha": "weight-decay", "early-stopping": "patience", "val": "held-out"},
    **{"validation": "held-out", "validation-split": "held-out", "test-size": "held-out", "sep": "separator"},
    **{"delimiter": "separator", "delim": "separator", "label": "target", "y": "target", "precision": "dtype"},
    **{"out": "output", "probabilities": "proba", "probs": "proba", "device": "backend", "random-state": "seed"},
    **{
        "normalize": "standardize",
        "clip": "clip-norm",
        "ignore": "drop",
        "exclude": "drop",
        "weights": "sample-weight",
    },
}
"""What other programs call options, without the dashes."""

_VALUE = r"""(\[[^\]]*\]|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|…|[\w.+-]+)?"""


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Write a message's keyword arguments as options.

    Args:
        message: of an error of the library.
        options: the option for each keyword, e.g. "--max-bytes" for "max_bytes".
    """
    message = message.replace("resume=False", "--overwrite")
    known = "|".join(map(re.escape, sorted(options, key=len, reverse=True)))
    message = re.sub(
        rf"(?<![\w'\"-])({known})={_VALUE}", lambda found: _as_option(options[found[1]], found[2] or ""), message
    )
    message = re.sub(rf"^({known}): ", lambda found: f"{options[found[1]]}: ", message)
    with_underscore = "|".join(name for name in options if "_" in name)
    return re.sub(rf"(?<![\w'\"/.-])({with_underscore})(?![\w'\"/.])", lambda found: options[found[1]], message)


def _as_option(option: str, value: str) -> str:
    try:
        given = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"{option} {value}".rstrip()
    if given is True:
        return option
    values = given if isinstance(given, list) else [given]
    return " ".join(f"{option} {shlex.quote(str(item))}" for item in values)


def nearest_option(option: str, known: list[str]) -> str:
    """Return " Did you mean --learning-rate?" for --lr; "" if nothing is meant."""
    meant = f"--{SYNONYMS.get(option.lstrip('-').replace('_', '-').lower(), '')}"
    return f" Did you mean {meant}?" if meant in known else ""
