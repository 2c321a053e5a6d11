"""Kernel arguments: what kernels call Python's functions, matrices and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpuback._backends.cuda.arrays import pitch_for, pitch_of
from gpuback._backends.cuda.planned_layers import BOX_COLUMNS, Box
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import ACTIVATIONS, Activation
from gpuback._core.losses import Loss
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument, LaunchPlan, TensorMap
from gpuback.errors import OptionError

SOFTMAX = -1
"""How kernels know the output function that is no activation."""

FROM_A, COMPILED_IN = 32, 64
"""Bits of the kernels' number for an activation: g' is computed from a; its case is compiled into this variant."""

MOST_COMPILED_IN = 32
"""How many activations can be compiled into one variant."""


class Cases(NamedTuple):
    """The activations of one launch.

    Activations without a kernel_id are numbered by their first appearance, so that equal launches have equal variants,
    in whatever order activations were registered.

    Attributes:
        numbers: the kernels' number for each.
        defines: macros that give the launch's variant the cases that kernels do not have.
    """

    numbers: tuple[int, ...]
    defines: tuple[str, ...]

    def added_to(self, plan: LaunchPlan) -> LaunchPlan:
        """Return the plan, whose variant now has the cases."""
        if not self.defines:
            return plan
        return plan._replace(variant=plan.variant._replace(defines=plan.variant.defines + self.defines))


def cases_of(activations: Sequence[Activation | None]) -> Cases:
    """Give the activations of a launch their numbers; None is the identity.

    Raises:
        OptionError: there is neither a kernel nor a form of one.
    """
    numbers: list[int] = []
    compiled_in: dict[str, int] = {}
    forward, slope = [], []
    for activation in activations:
        if activation is None:
            activation = ACTIVATIONS["identity"]
        if activation.kernel_id is not None:
            numbers.append(activation.kernel_id)
            continue
        if activation.forms is None:
            raise OptionError(
                f"activation {activation.name!r} has no CUDA form: expected one with cuda=gpuback.CudaForms(…) in "
                "register_activation, or backend='numpy'"
            )
        if activation.name not in compiled_in:
            number = COMPILED_IN + (FROM_A if activation.derivative_from == "a" else 0) + len(compiled_in)
            compiled_in[activation.name] = number
            g, derivative = activation.forms.expressions
            forward.append(f"USER_CASE({number}, {g.code})")
            slope.append(f"USER_CASE({number}, {derivative.code})")
        numbers.append(compiled_in[activation.name])
    defines = (f"USER_FORWARD={' '.join(forward)}", f"USER_SLOPE={' '.join(slope)}") if compiled_in else ()
    return Cases(tuple(numbers), defines)


def output_cases(name: str) -> Cases:
    """Give an output function, alone in its launch, its number.

    Raises:
        OptionError: there is neither a kernel nor a form of it.
    """
    return Cases((SOFTMAX,), ()) if name == "softmax" else cases_of([activation_named(name)])


def output_id(name: str) -> int:
    """Return the number of an output function that losses' kernels know.

    Raises:
        OptionError: they know none.
    """
    (number,), defines = output_cases(name)
    if defines:
        raise OptionError(f"output {name!r}: expected one that losses' kernels have, or backend='numpy'")
    return number


def loss_id(loss: Loss) -> int:
    """Return the kernels' number for a loss that has a kernel."""
    assert loss.kernel_id is not None
    return loss.kernel_id


def loss_parameters(xp: Any, loss: Loss, width: int, dtype: np.dtype[Any]) -> Array | None:
    """Return the numbers that kernels read for a loss on an output layer of this width; None if there are none."""
    parameters = loss.parameters(width)
    return None if parameters is None else xp.asarray(parameters.astype(dtype))


def ints(**values: int) -> dict[str, Argument]:
    """Make kernel arguments of type int."""
    return {name: np.int32(value) for name, value in values.items()}


def matrices(**given: Array | None) -> dict[str, Argument]:
    """Give each matrix its pitch: da_bo=da makes the arguments da_bo and da_pitch. None is a null pointer."""
    arguments: dict[str, Argument] = {}
    for name, matrix in given.items():
        arguments[name] = matrix
        arguments[pitch_name(name)] = np.int32(0) if matrix is None else pitch_of(matrix)
    return arguments


def pitch_name(name: str) -> str:
    """Name the parameter of a matrix's pitch: da_pitch for da_bo."""
    return f"{name.rpartition('_')[0]}_pitch"


def map_arguments(
    boxes: Sequence[Box],
    given: Mapping[str, Argument],
    shapes: Mapping[str, tuple[int, int]],
    precision: Precision,
    pointers: Sequence[str],
) -> dict[str, Argument]:
    """Make the arguments of a kernel that takes its matrices by map.

    Args:
        boxes: the parameters that are maps.
        given: for each matrix, such as da_bo, the array, a Slot or None; and its pitch, da_pitch.
        shapes: of these matrices.
        precision: whose operands they hold.
        pointers: the matrices that the kernel takes by pointer and pitch, too.

    Returns:
        The maps, in the order of `boxes`, and the pointers with their pitches.
    """
    arguments: dict[str, Argument] = {}
    for box in boxes:
        array = None if box.matrix is None else given[box.matrix]
        arguments[box.parameter] = None
        if box.matrix is None or array is None or getattr(array, "dtype", None) not in (None, precision.operand):
            continue  # nothing to copy, or float32, which kernels store themselves
        rows, columns = shapes[box.matrix]
        pitch = int(given[pitch_name(box.matrix)]) if rows > 1 else pitch_for(columns, precision.operand)
        arguments[box.parameter] = TensorMap(
            array, columns, rows, pitch, (BOX_COLUMNS, box.rows), precision.operand.name
        )
    for name in pointers:
        arguments |= {name: given[name], pitch_name(name): given[pitch_name(name)]}
    return arguments


def labels_and_targets(y: Array) -> tuple[Array | None, Array | None]:
    """Tell labels (B,) from targets (B, n_L): kernels take both, and the other one is None."""
    return (y, None) if y.ndim == 1 else (None, y)
