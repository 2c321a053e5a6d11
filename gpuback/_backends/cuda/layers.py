"""The passes of a layer on CUDA, a launch each: forward, backward, and a delta by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from gpuback._backends.cuda import layer_plans, row_plans
from gpuback._backends.cuda.arguments import Cases, cases_of, ints, map_arguments, matrices, pitch_name
from gpuback._backends.cuda.arrays import CudaArrays, pitch_of
from gpuback._backends.cuda.formats import uses_tensor_cores
from gpuback._backends.cuda.planned_layers import LayerPlan
from gpuback._backends.cuda.workspace import CudaWorkspace
from gpuback._core.activations import Activation
from gpuback._core.precision import Precision
from gpuback._core.typing import Array
from gpuback._cuda.launch import Argument, Launch, Launcher, Slot

CACHED_LAUNCHES = 64
"""For how many shapes `fused_backward` keeps its launch, on each thread."""


class _LaunchCache(threading.local):
    """The launches of `_layer_backward` by shape, the oldest first. A bound launch is for one thread at a time."""

    def __init__(self) -> None:
        self.launches: dict[Any, Launch] = {}
        self.copies: dict[Any, Launch] = {}


class CudaLayers(CudaArrays):
    """The passes of a layer; see `NumpyOps`."""

    def __init__(
        self,
        xp: Any,
        launcher: Launcher,
        *,
        name: str = "cupy",
        device: AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__(xp, launcher, name=name, device=device)
        self._launch_cache = _LaunchCache()

    def bind_forward(
        self, W: Array, b: Array, h: Array, a: Array | None, activation: Activation | None, workspace: CudaWorkspace
    ) -> Callable[[Array], None]:
        """Bind h = g(a), a = h_prev Wᵀ + b, in one launch; see `NumpyOps.bind_forward`."""
        precision, (n_out, n_in) = workspace.precision, W.shape
        cases = cases_of([activation])
        plan = layer_plans.forward_plan(len(h), n_out, n_in, precision, self.launcher.limits)
        tensor_cores = uses_tensor_cores(precision)
        launches: dict[np.int32, Launch] = {}

        def forward(h_prev: Array) -> None:
            pitch = pitch_of(h_prev)
            launch = launches.get(pitch)
            if launch is None:
                given = {"h_bi": Slot(), "h_pitch": pitch} | matrices(w_oi=W, a_bo=a, out_bo=h)
                if plan.boxes:
                    shapes = {"h_bi": (len(h), n_in), "w_oi": W.shape, "a_bo": h.shape, "out_bo": h.shape}
                    given = map_arguments(plan.boxes, given, shapes, precision, pointers=["a_bo", "out_bo"])
                launch = launches[pitch] = self.launcher.bind(
                    cases.added_to(plan.launch),
                    **given,
                    bias_o=b,
                    **ints(n_batch=len(h), n_out=n_out, n_in=n_in, activation=cases.numbers[0]),
                    **(ints(out_is_float32=activation is None) if tensor_cores else {}),
                )
            launch(h_prev)

        return forward

    def bind_backward(
        self,
        da: Array,
        W: Array,
        da_prev: Array | None,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: CudaWorkspace,
    ) -> Callable[[Array, Array, Array, bool], None]:
        """Bind dW, db and da_prev in one launch; see `NumpyOps.bind_backward`."""
        precision, (n_out, n_in), rows = workspace.precision, W.shape, len(da)
        plan = layer_plans.layer_plan(
            rows,
            n_out,
            n_in,
            precision,
            self.launcher.limits,
            need_da_prev=da_prev is not None,
            from_a=activation_prev is not None and activation_prev.derivative_from == "a",
        )
        cases = cases_of([activation_prev])
        launches: dict[np.int32, Launch] = {}

        def bind(h_pitch: np.int32) -> Launch:
            return self._bind_layer(
                plan,
                precision,
                (rows, n_out, n_in),
                {"h_bi": Slot(), "h_pitch": h_pitch}
                | matrices(da_bo=da, w_oi=W, source_bi=source_prev, da_prev_bi=da_prev),
                {"partials": workspace.partials, "arrivals": workspace.counters, "next_tile": workspace.next_tile},
                da_prev_is_float32=da_prev is not None and da_prev.dtype == precision.accumulator,
                cases=cases,
                da_prev_factor=1.0 / scale if activation_prev is None else 1.0,
                factor=1.0 / scale,
            )

        def backward(h_prev: Array, dW: Array, db: Array, accumulate: bool) -> None:
            pitch = pitch_of(h_prev)
            launch = launches.get(pitch)
            if launch is None:
                launch = launches[pitch] = bind(pitch)
            launch(h_prev, dW, db, accumulate)

        return backward

    def bind_delta(
        self,
        da: Array,
        W: Array,
        da_prev: Array,
        activation_prev: Activation | None,
        source_prev: Array | None,
        scale: float,
        workspace: CudaWorkspace,
    ) -> Callable[[], object]:
        """Bind da_prev by itself: the backward pass without work tiles of dW; see `NumpyOps.bind_delta`."""
        precision, (n_out, n_in), rows = workspace.precision, W.shape, len(da)
        launch = self._bind_layer(
            layer_plans.delta_plan(rows, n_out, n_in, precision, self.launcher.limits),
            precision,
            (rows, n_out, n_in),
            matrices(da_bo=da, h_bi=None, w_oi=W, source_bi=source_prev, da_prev_bi=da_prev),
            {"partials": None, "arrivals": None, "next_tile": workspace.next_tile},
            da_prev_is_float32=da_prev.dtype == precision.accumulator,
            cases=cases_of([activation_prev]),
            da_prev_factor=1.0 / scale if activation_prev is None else 1.0,
        )
        return partial(launch, None, None, False)

    def _bind_layer(
        self,
        plan: LayerPlan,
        precision: Precision,
        shape: tuple[int, int, int],
        given: dict[str, Argument],
        workspace: dict[str, Argument],
        *,
        cases: Cases,
        da_prev_is_float32: bool = False,
        da_prev_factor: float = 1.0,
        factor: float = 1.0,
    ) -> Launch:
        """Bind a layer's backward pass.

        Args:
            plan, precision, shape: of the layer; the shape is (B, n_out, n_in).
            given: da, h, W, source and da_prev, each with its pitch.
            workspace: for sums over the batch and, in persistent kernels, for the next tile.
            cases: of the layer below's activation.
            da_prev_is_float32: da_prev is stored in the accumulator's format.
            da_prev_factor, factor: of da_prev at the network's input, and of dW and db.

        Returns:
            A function of the Slots in `given`, of dW, db and accumulate, and of the Slots in `workspace`.
        """
        rows, n_out, n_in = shape
        total: Any = precision.accumulator.type
        if plan.boxes:
            below = rows, n_in
            shapes = {"da_bo": (rows, n_out), "h_bi": below, "w_oi": (n_out, n_in), "source_bi": below}
            shapes["da_prev_bi"] = below
            given = map_arguments(plan.boxes, given, shapes, precision, pointers=["da_prev_bi"])
        if uses_tensor_cores(precision):
            given = given | ints(da_prev_is_float32=da_prev_is_float32)
        if not plan.persistent:
            workspace = {name: array for name, array in workspace.items() if name != "next_tile"}
        split = plan.split
        return self.launcher.bind(
            cases.added_to(plan.launch),
            **given,
            dw_oi=Slot(),
            db_o=Slot(),
            accumulate=Slot(np.int32),
            **ints(n_batch=rows, n_out=n_out, n_in=n_in, activation=cases.numbers[0]),
            da_prev_factor=total(da_prev_factor),
            factor=total(factor),
            **ints(n_splits=split.splits, group_size=split.group_size, rows_per_split=split.rows_per_split),
            **workspace,
        )

    def bind_layer_backward(
        self, da: Array, n_in: int, activation_prev: Activation, precision: Precision
    ) -> Callable[[Array, Array, Array, Array | None, Array, Array, Array | None, bool], None]:
        """Bind nothing yet: addresses and pitches, which choose the launch, are known at the call."""
        return partial(self._layer_backward, activation_prev, precision)

    def _layer_backward(
        self,
        activation_prev: Activation,
        precision: Precision,
        da: Array,
        h_prev: Array,
        W: Array,
        source: Array | None,
        dW: Array,
        db: Array,
        da_prev: Array | None,
        accumulate: bool,
    ) -> None:
        """Run `gpuback.fused_backward` on checked arguments. The launch of a shape is cached for the next call."""
        for array in (da, h_prev, W, source, dW, db, da_prev):
            self._require_aligned(array)
        shape = len(da), *W.shape
        need, from_a = da_prev is not None, activation_prev.derivative_from == "a"
        plan = layer_plans.layer_plan(*shape, precision, self.launcher.limits, need_da_prev=need, from_a=from_a)
        inputs = {"da_bo": da, "h_bi": h_prev, "w_oi": W, "source_bi": source}
        operands = {name: self._row_contiguous(array) for name, array in inputs.items()} | {"da_prev_bi": da_prev}
        slots = list(operands)
        if plan.boxes:
            mapped = [box.matrix for box in plan.boxes if box.matrix is not None]
            slots = [*mapped, "da_prev_bi"]
            padded = {name: self._with_padded_rows(operands[name], copied=name in inputs) for name in mapped}
            operands = dict.fromkeys(operands) | padded
        pitches = {name: None if array is None else pitch_of(array) for name, array in operands.items()}
        key = *shape, precision, activation_prev.name, *pitches.values()
        launches = self._launch_cache.launches
        if key not in launches:
            if len(launches) >= CACHED_LAUNCHES:
                launches.pop(next(iter(launches)))
            given: dict[str, Argument] = {}
            for name, pitch in pitches.items():
                given |= matrices(**{name: None}) if pitch is None else {name: Slot(), pitch_name(name): pitch}
            launches[key] = self._bind_layer(
                plan,
                precision,
                shape,
                given,
                {"partials": Slot(), "arrivals": Slot(), "next_tile": Slot()},
                cases=cases_of([activation_prev]),
            )
        # Fresh for each call: calls on different streams may be under way together.
        partials = self.empty(plan.partials, precision.accumulator)
        counters = self.xp.zeros(plan.counters + 1, np.uint32)
        arrays = [operands[name] for name in slots if operands[name] is not None]
        launches[key](*arrays, dW, db, accumulate, partials, counters, *([counters[-1:]] if plan.persistent else []))
        if da_prev is not None and operands["da_prev_bi"] is not da_prev:
            self._copy_elements(operands["da_prev_bi"], da_prev)

    def _with_padded_rows(self, array: Array | None, copied: bool) -> Array | None:
        """Return a matrix whose rows begin at multiples of 16 bytes: itself, or a new one, a copy if it is `copied`."""
        if array is None or self._has_padded_rows(array):
            return array
        padded = self.padded(len(array), array.shape[1], array.dtype)
        if copied:
            self._copy_elements(array, padded)
        return padded

    def _copy_elements(self, source: Array, target: Array) -> None:
        """Copy target = source, of 16-bit elements with contiguous rows."""
        (rows, n), x_pitch, out_pitch = source.shape, pitch_of(source), pitch_of(target)
        key = rows, n, source.dtype, x_pitch, out_pitch
        copies = self._launch_cache.copies
        if key not in copies:
            if len(copies) >= CACHED_LAUNCHES:
                copies.pop(next(iter(copies)))
            copies[key] = self.launcher.bind(
                row_plans.copy_plan("copy_elements", rows, Precision.of(source.dtype)),
                x_bi=Slot(),
                x_pitch=x_pitch,
                out_bi=Slot(),
                out_pitch=out_pitch,
                **ints(n_batch=rows, n=n),
            )
        copies[key](source, target)
