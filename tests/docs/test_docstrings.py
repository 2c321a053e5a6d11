"""The examples in docstrings, run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["gpuback.network", "gpuback.schedules", "gpuback.testing", "gpuback.train_step"])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
