"""How activations without a kernel get cases in the variants of a launch: numbers, macros, plans."""

from __future__ import annotations

import numpy as np
import pytest
from support.kernel_layers import H200
from support.requirements import require_emulator, require_gates

from gpuback import CudaForms, register_activation
from gpuback._backends.cuda import layer_plans, network_plans, row_plans
from gpuback._backends.cuda.arguments import cases_of
from gpuback._core.activation_names import activation_named
from gpuback._core.architecture import Architecture
from gpuback._core.precision import Precision
from gpuback._gates.checks import check
from gpuback._gates.variants import CompiledKernel, every_kernel

FLOAT32 = Precision.of("float32")


def cases(*names: str):
    return cases_of([activation_named(name) for name in names])


def test_the_tables_activations_need_none() -> None:
    assert cases("relu", "gelu") == ((1, 32), ())
    assert cases_of([None]) == ((0,), ())
    plan = layer_plans.forward_plan(9, 8, 7, FLOAT32, H200).launch
    assert cases("relu").added_to(plan) is plan


def test_numbers_go_by_the_first_appearance_and_tell_the_source() -> None:
    found = cases("silu(beta=2)", "tanh", "softplus(beta=5)", "silu(beta=2)", "silu(beta=3)")
    assert found.numbers == (96, 5, 65, 96, 98)
    forward, slope = found.defines
    assert forward.startswith("USER_FORWARD=USER_CASE(96, ") and forward.count("USER_CASE(") == 3
    assert slope.startswith("USER_SLOPE=USER_CASE(96, ") and "USER_CASE(65, (-expm1_of(((-Real(5.0)) * x))))" in slope


def test_the_variant_does_not_depend_on_the_order_of_registration() -> None:
    """So that the same kernels come out of the cache in every process."""
    forms = {"test_one": CudaForms("x * x", "2 * x"), "test_two": CudaForms("x * x * x", "3 * x * x")}
    functions = {"test_one": (np.square, lambda a: 2 * a), "test_two": (lambda a: a**3, lambda a: 3 * a * a)}

    def plans() -> list[object]:
        architecture = Architecture.create((5, 8, 7, 3), activation=["test_two", "test_one"])
        for plan in (network_plans.step_plan, network_plans.passes_plan):
            plan.cache_clear()
        step = network_plans.step_plan(architecture, 64, H200)
        passes = network_plans.passes_plan(architecture, 64, H200, backward=True)
        layer = cases("test_two").added_to(layer_plans.forward_plan(9, 8, 7, FLOAT32, H200).launch)
        return [step.launch.variant, passes.launch.variant, layer.variant, step.layout.tobytes()]

    found = []
    for order in (("test_one", "test_two"), ("test_two", "test_one")):
        with pytest.MonkeyPatch.context() as patch:
            table: dict = {}
            patch.setattr("gpuback._core.activation_names.REGISTERED", table)
            patch.setattr("gpuback._core.own_activations.REGISTERED", table)
            for name in order:
                forward, slope = functions[name]
                register_activation(name, forward=forward, slope=slope, cuda=forms[name])
            found.append(plans())
    assert found[0] == found[1]


def test_equal_networks_have_equal_variants_and_others_do_not() -> None:
    def variant(*activations: str):
        architecture = Architecture.create((5, 8, 7, 3), activation=activations)
        return network_plans.step_plan(architecture, 64, H200).launch.variant

    assert variant("softplus(beta=5)", "relu") == variant("softplus( beta=5.0 )", "relu")
    assert variant("softplus(beta=5)", "relu") != variant("softplus(beta=6)", "relu")
    assert variant("tanh", "relu") == variant("relu", "gelu")


def test_more_activations_than_a_launch_takes_go_layer_by_layer() -> None:
    names = [f"softplus(beta={2 + k})" for k in range(33)]
    architecture = Architecture.create((8,) * 35, activation=names, dtype="bfloat16")
    refusal = network_plans.fused_plan(architecture, 64, H200)
    assert isinstance(refusal, network_plans.Refusal)
    assert refusal.reason == "kernels lack 33 of its activations, and a launch takes up to 32 of these"
    fewer = Architecture.create((8,) * 34, activation=names[:32], dtype="bfloat16")
    assert not isinstance(network_plans.fused_plan(fewer, 64, H200), network_plans.Refusal)


ENTRIES = {
    *("forward_simt", "layer_simt", "forward_mma", "layer_mma", "layer_mma_narrow", "fused_step", "fused_passes"),
    *("forward_wgmma_narrow", "layer_wgmma_narrow", "forward_wgmma", "layer_wgmma", "fused_step_wgmma"),
    *("finish_forward", "finish_delta"),
}
"""The kernels whose activations can be a user's."""


@pytest.mark.thorough
@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_kernels_compile_with_cases_without_spills(entry: str) -> None:
    """The first and the last variant of each kernel, with a case from a and one from h."""
    require_gates()
    own = cases("silu(beta=1.702)", "elu(alpha=0.5)")
    variants = [case for case in every_kernel() if case.variant.entry == entry]
    compiled = [
        CompiledKernel(case.variant._replace(defines=case.variant.defines + own.defines), case.block, case.shared_bytes)
        for case in dict.fromkeys([variants[0], variants[-1]])
    ]
    assert not [(row.name, row.faults) for row in check(compiled, ["sm_90a"]) if row.faults]


@pytest.mark.thorough
def test_entries_are_those_with_an_activation() -> None:
    """By the parameters of the kernels; in fused networks the layout holds activations."""
    require_emulator()
    from emulator.build import KERNELS, entry_points

    found = set()
    for case in {case.variant.source: case for case in every_kernel()}.values():
        defines = tuple(case.variant.defines)
        for entry, parameters in entry_points(KERNELS / case.variant.source, defines, (9, 0)).items():
            if "activation" in parameters or {"layout", "x_bi"} <= set(parameters):
                found.add(entry)
    assert found == ENTRIES
    assert row_plans.exact_plan("finish_delta", 1, 1, FLOAT32).variant.entry in ENTRIES
