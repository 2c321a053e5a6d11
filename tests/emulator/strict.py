"""NumPy that notices what must not be done while launches are recorded into a CUDA graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.launcher import EmulationError, EmulatorLauncher


class StrictNumpy:
    """Stands in for the module `numpy`: while `launcher` records, none of its functions may be called.

    A graph of CuPy's would hold memory that is given to others once the recording is over, or a copy that was made from
    what an array held by chance.
    """

    def __init__(self, launcher: EmulatorLauncher) -> None:
        self._launcher = launcher

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if not callable(value) or isinstance(value, type):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            if self._launcher.capturing():
                raise EmulationError(f"{name} while launches are recorded")
            return value(*arguments, **options)

        return call
