"""The dtypes that networks compute in, by the names that tests use: "tf32" is float32 with allow_tf32."""

from typing import Any

import ml_dtypes
import numpy as np

HAS_LONG_DOUBLE = np.finfo(np.longdouble).nmant >= 60
"""Without it there is nothing to hold float64 to."""

DTYPES: dict[str, dict[str, Any]] = {
    **({"float64": {"dtype": "float64"}} if HAS_LONG_DOUBLE else {}),
    "float32": {"dtype": "float32"},
    "tf32": {"dtype": "float32", "allow_tf32": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}
"""Options of `MLP`."""

OPERAND = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
