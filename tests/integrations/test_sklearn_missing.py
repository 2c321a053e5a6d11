"""gpuback.sklearn where scikit-learn is not installed; with it, tests/peers has the tests."""

import importlib
import sys

import pytest

from gpuback.errors import GpubackError


def test_importing_it_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for name in [name for name in sys.modules if name.startswith("gpuback.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install '\.\[sklearn\]'") as caught:
        importlib.import_module("gpuback.sklearn")
    assert isinstance(caught.value, GpubackError)
