"""The parts of a schema in a model's file, each checked when it is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuback._core.fields import Fields
from gpuback.datasets.columns import CATEGORY, KINDS, Column
from gpuback.datasets.standardization import Standardization
from gpuback.datasets.targets import CLASSIFICATION, REGRESSION, Target

MEAN, SCALE, FILL = "schema.mean", "schema.scale", "schema.fill"
TARGET_MEAN, TARGET_SCALE = "schema.target_mean", "schema.target_scale"
"""Names of arrays."""

_MOST_OUTPUTS = 2**31


def restored_columns(fields: Fields) -> tuple[Column, ...]:
    """Return the features' columns."""
    found = tuple(_column(fields, value) for value in fields.items("columns"))
    if not found or len({column.name for column in found}) != len(found):
        fields.refuse("columns", "one column or more, of different names", [column.name for column in found])
    return found


def _column(fields: Fields, value: Any) -> Column:
    expected = "a name, a kind, and the values of a category"
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        fields.refuse("columns", expected, value)
    name, kind, values = value
    if not isinstance(kind, str) or kind not in KINDS or not isinstance(values, list):
        fields.refuse("columns", expected, value)
    if not all(isinstance(item, str) for item in values) or len(set(values)) != len(values):
        fields.refuse("columns", expected, value)
    if bool(values) != (kind == CATEGORY):
        fields.refuse("columns", expected, value)
    return Column(name, kind, tuple(values))


def restored_target(fields: Fields) -> Target:
    """Return the target."""
    name, task, classes = fields.value("target"), fields.value("task"), fields.items("classes")
    if not isinstance(name, str):
        fields.refuse("target", "a name", name)
    if task not in (CLASSIFICATION, REGRESSION):
        fields.refuse("task", f"{CLASSIFICATION} or {REGRESSION}", task)
    kinds = {type(value) for value in classes}
    if len(kinds) > 1 or not kinds <= {str, int, bool} or len(set(classes)) != len(classes):
        fields.refuse("classes", "different texts, whole numbers or truth values", classes)
    if (len(classes) < 2) if task == CLASSIFICATION else classes:
        fields.refuse("classes", "two or more for a classification, and none for a regression", classes)
    return Target(name, task, tuple(classes), fields.count("width", 1, _MOST_OUTPUTS))


def restored_scaling(fields: Fields, mean: str, scale: str, width: int) -> Standardization:
    """Return what standardizes so many columns, of the arrays of these names."""
    sigma = fields.array(scale, (width,), np.dtype(np.float64))
    if not (sigma > 0).all():
        fields.refuse(scale, "numbers above 0", sigma)
    return Standardization(restored_numbers(fields, mean, width), sigma)


def restored_numbers(fields: Fields, name: str, width: int) -> NDArray[np.float64]:
    """Return an array of so many finite numbers."""
    numbers = fields.array(name, (width,), np.dtype(np.float64))
    if not np.isfinite(numbers).all():
        fields.refuse(name, "finite numbers", numbers)
    return numbers
