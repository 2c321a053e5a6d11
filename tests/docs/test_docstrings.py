"""The examples in docstrings, run."""

import doctest
import importlib

import pytest

MODULES = [
    "gpuback._core.expressions",
    "gpuback._core.own_activations",
    "gpuback._network.mlp",
    "gpuback._training.train_step",
    "gpuback.schedules",
    "gpuback.testing",
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
