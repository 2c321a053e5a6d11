"""Every kernel compiles for every GPU without spills, with matrix instructions where claimed; and the gates work."""

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.requirements import require, require_gates

from gpuback._cuda.compiler import choices
from gpuback._cuda.launch import Variant
from gpuback._cuda.sources import kernels_folder
from gpuback._gates import __main__ as gates
from gpuback._gates.checks import FULL_ARCHS, SAMPLED_ARCHS, check, exists_for, sample
from gpuback._gates.disassembly import count, disassembler, section
from gpuback._gates.occupancy import LIMITS, occupancy
from gpuback._gates.variants import every_kernel
from gpuback.errors import BackendError

SOURCES = {
    # A box comes by TMA and goes by TMA; between, a warp group multiplies it by itself.
    "hopper.cu": """
#include "common/ptx_sm90.cuh"
extern "C" __global__ void __launch_bounds__(128, 1) product(const __grid_constant__ TensorMap x,
                                                             const __grid_constant__ TensorMap y, float* out) {
  PANEL_MEMORY(memory);
  const uint32 panel = shared_address(memory), barrier = panel + 8192;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, 8192);
    tma_load_2d(panel, &x, barrier, 0, 0);
  }
  __syncthreads();
  setmaxnreg_dec<64>();
  mbarrier_wait(barrier, 0);
  float d[32] = {};
  wgmma_fence();
#ifdef MAY_BE_EMPTY
  if (out)
#endif
    wgmma_ss_bf16<0, 0>(d, panel_descriptor(panel, 1, 1024), panel_descriptor(panel, 1, 1024), 1);
  wgmma_commit();
#ifdef READS_EARLY
  d[0] += d[5];
#endif
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
  if (threadIdx.x == 0) {
    tma_store_2d(&y, panel, 0, 0);
    bulk_commit();
    bulk_wait<0>();
  }
}
""",
    "sound.cu": """
extern "C" __global__ void __launch_bounds__(256) sound(float* x) { x[threadIdx.x] *= FACTOR; }
extern "C" __global__ void __launch_bounds__(256) shared(float* x) {
  __shared__ float kept[512];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = kept[255 - threadIdx.x];
}
""",
    "faulty.cu": """
// 300 numbers alive at a time do not fit into 255 registers
extern "C" __global__ void spills(float* x) {
  float a[300];
#pragma unroll
  for (int i = 0; i < 300; ++i) a[i] = x[i * 32 + threadIdx.x];
  for (int j = 0; j < x[0]; ++j) {
#pragma unroll
    for (int i = 0; i < 300; ++i) a[i] = a[i] * a[(i + 7) % 300] + 1;
  }
#pragma unroll
  for (int i = 0; i < 300; ++i) x[i * 32 + threadIdx.x] = a[i];
}
extern "C" __global__ void stacks(float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * n];
  for (int i = 0; i < 64; ++i) x[i] = a[(i * n) % 64];
}
""",
    "matrix.cu": """
extern "C" __global__ void matrix(float* c, const unsigned* a) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
}
""",
}


def case(source, entry, defines=(), block=256, shared_bytes=0, **properties):
    return SimpleNamespace(
        variant=Variant(source, entry, tuple(defines), **properties), block=block, shared_bytes=shared_bytes
    )


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    require_gates()
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(tmp_path / "kept"))
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    (folder / "common").symlink_to(kernels_folder() / "common")
    return folder


CASES = every_kernel()
"""gpuback's kernels. Their cubins are kept in the user's cache: a second run compiles nothing."""


def require_sound(rows):
    assert rows
    assert {f"{row.name} {row.arch}": row.faults for row in rows if row.faults} == {}


# --- gpuback's kernels


def modules(cases):
    """Kernels of one file and one set of macros, which are compiled together."""
    together = defaultdict(list)
    for case in cases:
        together[case.variant.source, case.variant.defines].append(case)
    return list(together.values())


def modules_and_archs(cases, archs):
    """Parameters of a test: each module with each architecture that it exists for."""
    return [
        pytest.param(module, arch, id="-".join([Path(first.source).stem, *choices(first), arch]))
        for module in modules(cases)
        for first in [module[0].variant]
        for arch in archs
        if exists_for(first, arch)
    ]


@pytest.mark.thorough
@pytest.mark.parametrize(("module", "arch"), modules_and_archs(CASES, FULL_ARCHS))
def test_every_kernel_is_sound(module, arch):
    require_gates(arch)
    require_sound(check(module, [arch]))


@pytest.mark.thorough
@pytest.mark.parametrize(("module", "arch"), modules_and_archs(sample(CASES), SAMPLED_ARCHS))
def test_two_of_each_kernel_are_sound_on_the_other_gpus(module, arch):
    require_gates(arch)
    require_sound(check(module, [arch]))


def test_there_are_few_modules():
    """Kernels of one file and one set of macros are compiled together. A module costs seconds at its first use, and
    gates compile all of them: one more needs a reason. Copies, per-sample gradients, loss scaling and dW of fused
    networks have modules of their own, so that a first prediction or step compiles only what it launches.

    Those for Hopper compile for one architecture. A narrow layer has 12, of three widths, with and without a place for
    pre-activations, in two formats, and 6 for forward passes. Wide layers have 2, for both passes. A whole
    network's step has 4, of two widths.
    """
    variants = [case.variant for case in CASES]
    assert len(set(variants)) == len(variants)
    for_hopper = [case for case in CASES if case.variant.wgmma]
    assert len(modules(case for case in CASES if not case.variant.wgmma)) <= 75
    assert len(modules(for_hopper)) <= 24


def test_every_kernel_file_has_a_variant():
    folder = kernels_folder()
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*.cu")}
    assert files == {case.variant.source for case in CASES}


# --- the gates


def test_a_sound_kernel_has_no_fault_and_its_shared_memory_is_counted(kernels):
    rows = check(
        [case("sound.cu", "shared", ["FACTOR=2"], shared_bytes=1000), case("sound.cu", "sound", ["FACTOR=2"])],
        ["sm_80", "sm_90a"],
        folder=kernels,
    )
    assert [(row.variant.entry, row.arch, row.shared_bytes, row.faults) for row in rows] == [
        ("shared", "sm_80", 3048, ()),
        ("shared", "sm_90a", 3048, ()),
        ("sound", "sm_80", 0, ()),
        ("sound", "sm_90a", 0, ()),
    ]
    assert rows[0].name == "shared FACTOR=2"


@pytest.mark.thorough(first=1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_spills_and_stack_frames_are_faults(kernels, arch):
    require_gates(arch)
    spills, stacks = check([case("faulty.cu", "spills", block=32), case("faulty.cu", "stacks")], [arch], folder=kernels)
    assert any("spills" in fault for fault in spills.faults)
    (fault,) = stacks.faults
    assert "256 bytes on the stack" in fault


@pytest.mark.thorough(first=2)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"])
def test_a_tensor_core_kernel_must_have_matrix_instructions(kernels, arch):
    require_gates(arch)
    rows = check(
        [case("matrix.cu", "matrix", tensor_cores=True), case("sound.cu", "sound", ["FACTOR=1"], tensor_cores=True)],
        [arch],
        folder=kernels,
    )
    assert rows[0].faults == () and rows[0].matrix == {"HMMA": 1}
    assert rows[1].faults == ("has no matrix instruction",)


@pytest.mark.thorough(first=1)
def test_instructions_of_a_kernel_for_hopper_are_counted_and_what_ptxas_undoes_is_a_fault(kernels):
    require_gates("sm_90a")
    cases = [
        case("hopper.cu", "product", tensor_cores=True, wgmma=True),
        case("hopper.cu", "product", ["READS_EARLY"], tensor_cores=True, wgmma=True),
        case("hopper.cu", "product", ["MAY_BE_EMPTY"], tensor_cores=True, wgmma=True),
        case("sound.cu", "sound", ["FACTOR=2"], wgmma=True),
    ]
    sound, early, empty, without = check(cases, ["sm_80", "sm_90", "sm_90a", "sm_120"], folder=kernels)
    assert sound.faults == () and sound.matrix == {"UTMALDG": 1, "USETMAXREG": 1, "HGMMA": 1, "UTMASTG": 1}
    assert sound.resources.parameter_sizes == (128, 128, 8)
    (fault,) = early.faults
    assert "C7517" in fault and "product" in fault
    assert empty.faults == ("has 1 empty HGMMA: a group of products may be empty, and waits count it",)
    assert without.faults == ("has no HGMMA",)
    assert {row.arch for row in (sound, early, empty, without)} == {"sm_90a"}


def test_kernels_for_hopper_are_left_out_elsewhere(monkeypatch, capsys):
    require_gates()
    cases = [case("hopper.cu", "product", wgmma=True), case("sound.cu", "sound")]
    chosen = []
    monkeypatch.setattr(gates, "check_pairs", lambda pairs: chosen.extend(pairs) or [])
    gates.main(["--all"], cases)
    assert chosen == [(cases[0], "sm_90a"), *[(cases[1], arch) for arch in gates.ARCHS]]
    chosen.clear()
    gates.main(["--arch", "sm_80,sm_90a"], cases)
    assert chosen == [(cases[0], "sm_90a"), (cases[1], "sm_80"), (cases[1], "sm_90a")]
    assert "1 kernel for sm_90a only: left out of sm_80" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gates.main(["--arch", "sm_80", "--kernel", "product"], cases)
    assert (
        "for sm_80 there is none of these kernels, which exist for sm_90a only:\n  product" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_ci_may_not_skip_the_gates(monkeypatch, ci, outcome):
    def missing():
        raise BackendError("no NVRTC")

    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no NVRTC"):
        require(missing)


def test_a_second_check_compiles_and_disassembles_nothing(kernels, monkeypatch):
    given = [case("matrix.cu", "matrix", tensor_cores=True)], ["sm_80"]
    rows = check(*given, folder=kernels)
    monkeypatch.setattr("gpuback._cuda.compiler._compile", None)
    monkeypatch.setattr("gpuback._gates.disassembly._disassemble", None)
    assert check(*given, folder=kernels) == rows


def test_the_sample_is_the_first_and_the_last_of_each_kernel():
    cases = [case("a.cu", "a", [f"N={n}"]) for n in range(3)] + [case("b.cu", "b"), case("a.cu", "c")]
    assert sample(cases) == [cases[0], cases[2], cases[3], cases[4]]


@pytest.mark.parametrize("rich", [True, False])
def test_the_command_prints_a_table_and_its_status_says_whether_all_is_sound(kernels, monkeypatch, capsys, rich):
    monkeypatch.setattr("gpuback._cuda.sources.kernels_folder", lambda: kernels)
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    sound = [case("matrix.cu", "matrix", tensor_cores=True), case("sound.cu", "shared", ["FACTOR=1"])]
    assert gates.main(["--arch", "sm_80,sm_90a"], sound) == 0
    output = capsys.readouterr().out
    for text in (
        "matrix",
        "shared FACTOR=1",
        "sm_90a",
        "1 HMMA",
        "2.0 KB",
        "4 kernels compiled, 0 with faults (NVRTC 1",
    ):
        assert text in output
    assert gates.main(["--arch", "sm_80"], [*sound, case("faulty.cu", "stacks")]) == 1
    captured = capsys.readouterr()
    assert "stacks sm_80: keeps 256 bytes on the stack" in captured.err
    assert "3 kernels compiled, 1 with faults" in captured.out
    assert gates.main(["--arch", "sm_1"], sound) == 1
    assert "cannot compile for sm_1" in capsys.readouterr().err


def test_the_command_compiles_all_or_a_sample(kernels, monkeypatch, capsys):
    require_gates(*gates.ARCHS)
    monkeypatch.setattr("gpuback._cuda.sources.kernels_folder", lambda: kernels)
    cases = [case("sound.cu", "sound", [f"FACTOR={n}"]) for n in (1, 2, 3)]
    assert gates.main([], cases) == 0
    assert f"{3 * 2 + 2 * 5} kernels" in capsys.readouterr().out
    assert gates.main(["--all"], cases) == 0
    assert f"{3 * 7} kernels" in capsys.readouterr().out


def test_one_kernel_is_chosen_by_fragments_of_its_name(kernels, monkeypatch, capsys):
    monkeypatch.setattr("gpuback._cuda.sources.kernels_folder", lambda: kernels)
    cases = [case("sound.cu", entry, [f"FACTOR={n}"]) for entry in ("sound", "shared") for n in (1, 2)]
    assert gates.main(["--list", "--kernel", "FACTOR=2"], cases) == 0
    assert capsys.readouterr().out.splitlines() == ["sound FACTOR=2", "shared FACTOR=2"]
    assert gates.main(["--kernel", "sound", "FACTOR=2", "--arch", "sm_80", "--sass"], cases) == 0
    output = capsys.readouterr().out
    assert "1 kernels compiled, 0 with faults" in output
    assert "FMUL" in output or "FADD" in output
    assert "STS" not in output  # which the other kernel of the file has
    for arguments, message in (
        (["--kernel", "sound", "--arch", "sm_80", "--sass"], "sound FACTOR=1\n  sound FACTOR=2"),
        (["--kernel", "sound", "FACTOR=2", "--sass"], "one --arch"),
        (["--kernel", "none"], "no kernel has a name with none"),
    ):
        with pytest.raises(SystemExit):
            gates.main(arguments, cases)
        assert message in capsys.readouterr().err


def test_listings_of_both_disassemblers_are_read():
    nvdisasm = """
.text.layer:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
.text.update:
        /*0000*/                   DMMA.8x8x4 R4, R8, R12, R4 ;
        /*12330*/                  HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;
        /*12340*/             @UP1 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*12350*/                  UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*12360*/                  USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
.text.plain:
        /*0000*/                   FFMA R0, R1, R2, R3 ;
"""
    assert count(nvdisasm) == {
        "layer": {"HMMA": 2},
        "update": {"DMMA": 1, "empty HGMMA": 1, "HGMMA": 1, "UTMALDG": 1, "USETMAXREG": 1},
        "plain": {},
    }
    cuobjdump = """
\t\tFunction : layer
\t.headerflags\t@"EF_CUDA_SM90"
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x0000000816087223 */
                                                                          /* 0x000fe20000000018 */
"""
    assert count(cuobjdump) == {"layer": {"HMMA": 1}}
    assert "DMMA.8x8x4" in section(nvdisasm, "update") and "HMMA" not in section(nvdisasm, "update")
    assert "HMMA.16816" in section(cuobjdump, "layer") and not section(cuobjdump, "update")


def test_both_disassemblers_count_the_same(kernels, monkeypatch):
    from gpuback._cuda.compiler import compile_variant
    from gpuback._gates import disassembly

    path = compile_variant(Variant("matrix.cu", "matrix"), "sm_90a", folder=kernels).path
    counts = []
    for name, options in disassembly._COMMANDS.items():
        disassembler.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(disassembly, "_COMMANDS", {name: options})
            try:
                counts.append(count(disassembly._disassemble(path)))
            except BackendError as error:
                pytest.skip(str(error))
            finally:
                disassembler.cache_clear()
    assert counts == [{"matrix": {"HMMA": 1}}] * 2


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared_bytes", "blocks", "warps"),
    [
        # Worked by hand: 64 warps of sm_80; 32 registers · 32 lanes · 64 warps = 64 K registers just fit.
        ("sm_80", 32, 256, 0, 8, 1.0),
        ("sm_80", 33, 256, 0, 6, 0.75),  # 40 registers after rounding: 51 warps, 48 in fours, 6 blocks of 8
        ("sm_80", 255, 256, 0, 1, 0.125),
        ("sm_80", 16, 32, 0, 32, 0.5),  # blocks are the limit
        ("sm_80", 32, 256, 40 * 1024, 4, 0.5),  # 164 KB hold four of 41 KB
        ("sm_90a", 128, 128, 100 * 1024, 2, 0.125),
        ("sm_90a", 168, 256, 227 * 1024, 1, 0.125),
        ("sm_86", 32, 256, 100 * 1024, 0, 0.0),  # one block may have 99 KB
        ("sm_120", 40, 1024, 0, 1, 32 / 48),
    ],
)
def test_occupancy_is_what_the_limits_allow(arch, registers, threads, shared_bytes, blocks, warps):
    assert occupancy(arch, registers, threads, shared_bytes) == (blocks, warps)


def test_occupancy_of_an_unknown_architecture_is_not_guessed():
    assert occupancy("sm_130", 32, 256, 0) is None
    for arch in gates.ARCHS:
        assert int(arch[3:].rstrip("a")) in LIMITS
