"""How many threads NumPy's matrix products use, and a choice between one and all."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from threadpoolctl import ThreadpoolController


def setting() -> str:
    """Library and kernel, and what the environment asks of OpenBLAS."""
    blas = next((one for one in ThreadpoolController().info() if one["user_api"] == "blas"), None)
    if blas is None:
        return "BLAS unknown"
    words = [blas["internal_api"], blas.get("architecture") or ""]
    named = [f"{name}={os.environ[name]}" for name in ("OPENBLAS_CORETYPE",) if name in os.environ]
    return ", ".join([" ".join(filter(None, words)), *named])


def choices() -> dict[str, Callable[[], object]]:
    """All threads or one."""
    libraries = [one for one in ThreadpoolController().lib_controllers if one.user_api == "blas"]
    most = max((one.get_num_threads() or 1 for one in libraries), default=1)

    def limit(count: int) -> None:
        for library in libraries:
            library.set_num_threads(count)

    return {named(count): partial(limit, count) for count in dict.fromkeys((most, 1))}


def named(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
