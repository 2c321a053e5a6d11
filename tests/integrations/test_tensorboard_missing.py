"""gpuback.tensorboard where tensorboardX is not installed; with it, tests/peers has the tests."""

import importlib
import sys

import pytest

from gpuback.errors import GpubackError


def test_importing_it_without_a_writer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "gpuback.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"tensorboardX.*pip install '\.\[tensorboard\]'") as caught:
        importlib.import_module("gpuback.tensorboard")
    assert isinstance(caught.value, GpubackError)
