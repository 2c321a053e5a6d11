"""Threads of NumPy's matrix products, and a choice between one and all."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from threadpoolctl import ThreadpoolController

LIBRARIES = [one for one in ThreadpoolController().lib_controllers if one.user_api == "blas"]
MOST = max((one.get_num_threads() or 1 for one in LIBRARIES), default=1)
"""Threads when the process began. After a choice, BLAS only knows the chosen number."""


def setting() -> str:
    """Describe library and kernel, with OpenBLAS's environment variables."""
    if not LIBRARIES:
        return "BLAS unknown"
    blas = LIBRARIES[0].info()
    words = [blas["internal_api"], blas.get("architecture") or ""]
    named = [f"{name}={os.environ[name]}" for name in ("OPENBLAS_CORETYPE",) if name in os.environ]
    return ", ".join([" ".join(filter(None, words)), *named])


def choices() -> dict[str, Callable[[], object]]:
    """Offer all threads or one."""
    return {named(count): partial(limit, count) for count in dict.fromkeys((MOST, 1))}


def limit(count: int) -> None:
    for library in LIBRARIES:
        library.set_num_threads(count)


def named(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
