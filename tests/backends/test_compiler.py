"""gpuback._cuda.compiler and its cache: what is compiled once is found again, what is damaged is compiled anew."""

import json
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support.requirements import require_gates, require_nvrtc

from gpuback._cuda import cache, compiler, cubin
from gpuback._cuda.compiler import Resources, compile_variant, parse_log
from gpuback._cuda.launch import Variant
from gpuback._gates.disassembly import disassembler
from gpuback.errors import BackendError

ARCH = "sm_90a"
SCALE = Variant("scale.cu", "scale", ("FACTOR=3",))
SOURCES = {
    "twice.cuh": "#pragma once\n__device__ float twice(float x) { return 2 * x; }\n",
    "scale.cu": """#include "twice.cuh"
constexpr float three() { return 3; }
extern "C" __global__ void scale(float* x, int n, char c, double d) { x[n] = twice(x[n]) * FACTOR + c + d + three(); }
extern "C" __global__ void nothing() {}
""",
    "broken.cu": '#include "twice.cuh"\n\nextern "C" __global__ void broken(float* x) { x[0] = thrice(x[1]); }\n',
    "copies.cu": """extern "C" __global__ void copies() { asm volatile("cp.async.commit_group;"); }\n""",
}

posix_only = pytest.mark.skipif(os.name != "posix", reason="permission bits as POSIX has them")


@pytest.fixture
def kernels(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The cache of one test."""
    folder = tmp_path / "kept"
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(folder))
    cache._temporary_folder.cache_clear()
    cache._warn_once.cache_clear()
    yield folder
    cache._temporary_folder.cache_clear()
    cache._warn_once.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """Counts calls of NVRTC."""
    require_nvrtc()
    made = []

    def count(*arguments):
        made.append(arguments)
        return compile_now(*arguments)

    compile_now = compiler._compile
    monkeypatch.setattr(compiler, "_compile", count)
    return made


# --- compiling


def test_a_kernel_becomes_a_whole_cubin_and_its_resources_are_told(kernels, compilations):
    compiled = compile_variant(SCALE, ARCH, folder=kernels)
    content = compiled.path.read_bytes()
    assert content.startswith(b"\x7fELF") and content.endswith(b"\0")
    end, _ = cubin._ends(content)
    assert len(content) == end
    assert compiled.resources.parameter_sizes == (8, 4, 1, 8)
    assert compiled.resources.registers > 0
    assert compiled.resources.stack_bytes == compiled.resources.spill_store_bytes == 0
    assert compiled.warnings == ()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100a", "sm_120"])
def test_the_last_byte_is_there_for_every_layout_of_cubins(kernels, compilations, arch):
    require_nvrtc(arch)
    content = compile_variant(SCALE, arch, folder=kernels).path.read_bytes()
    assert len(content) == cubin._ends(content)[0]
    assert cubin.complete(content) == content
    assert cubin.complete(content[:-1]) == content
    for damaged in (content[:-2], content[:100], b"PTX", b""):
        with pytest.raises(BackendError, match="expected"):
            cubin.complete(damaged)


def test_the_disassembler_accepts_the_cubin(kernels, compilations):
    require_gates()
    path = compile_variant(SCALE, ARCH, folder=kernels).path
    assert b"scale" in subprocess.run([*disassembler(), path], capture_output=True, check=True).stdout


def test_a_compile_error_shows_the_log_with_the_kernels_own_file_and_line(kernels, compilations):
    with pytest.raises(BackendError, match=r'broken\.cu\(3\): error: identifier "thrice" is undefined') as caught:
        compile_variant(Variant("broken.cu", "broken", ("N=1",)), ARCH, folder=kernels)
    assert "broken.cu broken N=1 for sm_90a" in str(caught.value)
    (kernels / "twice.cuh").write_text("#pragma once\n\n\nfloat twice(flaot x);\n")
    with pytest.raises(BackendError, match=r"twice\.cuh\(4\): error"):
        compile_variant(SCALE, ARCH, folder=kernels)


def test_a_kernel_beyond_the_architecture_names_what_it_needs(kernels, compilations):
    if 75 not in compiler.load_nvrtc()[0].getSupportedArchs():
        pytest.skip("this NVRTC has left sm_75 behind")
    with pytest.raises(BackendError, match=r"needs sm_80 or later: choose dtype='float32'"):
        compile_variant(Variant("copies.cu", "copies"), "sm_75", folder=kernels)


def test_an_unknown_architecture_names_the_known_ones_and_the_remedy(kernels, compilations):
    for arch, remedy in (("sm_999", "upgrade"), ("sm_20", "earlier CUDA"), ("hopper", "upgrade")):
        with pytest.raises(BackendError, match=rf"cannot compile for {arch}: it knows .*sm_90.*{remedy}"):
            compile_variant(SCALE, arch, folder=kernels)


def test_a_kernel_that_the_file_lacks_names_those_it_has(kernels, compilations):
    with pytest.raises(BackendError, match="named 'scael', found (scale, nothing|nothing, scale)"):
        compile_variant(SCALE._replace(entry="scael"), ARCH, folder=kernels)


def test_cupy_that_cannot_be_imported_is_named(kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(BackendError, match=r"needs CuPy, which cannot be imported.*pip install '\.\[cuda12\]'"):
        compile_variant(SCALE, ARCH, folder=kernels)


def test_nvrtc_that_cannot_be_loaded_is_named(kernels, monkeypatch):
    def missing():
        raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    cuda = ModuleType("cupy.cuda")
    cuda.nvrtc = SimpleNamespace(getVersion=missing)
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    with pytest.raises(BackendError, match=r"needs NVRTC.*load libnvrtc\.so\.13.*pip install nvidia-cuda-nvrtc"):
        compile_variant(SCALE, ARCH, folder=kernels)


def test_importing_the_cuda_package_imports_no_cupy():
    script = """
import sys, pkgutil, importlib, gpuback._backends.cuda, gpuback._cuda, gpuback._gates
for package in (gpuback._backends.cuda, gpuback._cuda, gpuback._gates):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
print(sorted(name for name in sys.modules if name.startswith("cupy") or name == "rich"))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_cupy_and_nvrtc_warn_of_nothing_without_a_gpu(compilations):
    script = "from cupy.cuda import nvrtc; nvrtc.getVersion()"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment)


# --- the cache


def test_what_was_compiled_is_found_again(kernels, kept, compilations):
    first = compile_variant(SCALE, ARCH, folder=kernels)
    again = compile_variant(SCALE, ARCH, folder=kernels)
    assert first == again
    assert first.path.parent == kept
    compile_variant(SCALE._replace(entry="nothing"), ARCH, folder=kernels)  # another kernel of the same file
    assert len(compilations) == 1


@pytest.mark.parametrize("change", ["source", "header", "macro", "architecture", "version", "options"])
def test_whatever_the_result_depends_on_is_part_of_the_key(kernels, compilations, monkeypatch, change):
    compile_variant(SCALE, ARCH, folder=kernels)
    variant, arch = SCALE, ARCH
    if change in ("source", "header"):
        file = kernels / {"source": "scale.cu", "header": "twice.cuh"}[change]
        file.write_text(file.read_text().replace("2 *", "4 *").replace("twice(x[n]) *", "twice(x[n]) -"))
    elif change == "macro":
        variant = SCALE._replace(defines=("FACTOR=4",))
    elif change == "architecture":
        arch = "sm_80"
    elif change == "version":
        nvrtc, _ = compiler.load_nvrtc()
        monkeypatch.setattr(compiler, "load_nvrtc", lambda: (nvrtc, (99, 0)))
    else:
        monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-lineinfo"))
    compile_variant(variant, arch, folder=kernels)
    assert len(compilations) == 2


def damage_content(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_record(path):
    head = json.loads(path.with_suffix(".json").read_text())
    head["record"]["kernels"]["scale"]["registers"] = 1
    path.with_suffix(".json").write_text(json.dumps(head))


def take_another_entry(path):
    """As if somebody had renamed the files of another kernel."""
    cache.keep("other", ".cubin", b"other", {"kernels": {"scale": {}}, "warnings": []})
    for suffix in (".cubin", ".json"):
        (path.parent / f"other{suffix}").replace(path.with_suffix(suffix))


DAMAGE = {
    "changed": damage_content,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": lambda path: path.unlink(),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "record cut short": lambda path: path.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes()[:-9]),
    "record of another program": lambda path: path.with_suffix(".json").write_text("[1, 2]"),
    "record nested without end": lambda path: path.with_suffix(".json").write_text("[" * 100_000),
    "record changed": change_record,
    "another's": take_another_entry,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_compiled_anew(kernels, kept, compilations, damage):
    first = compile_variant(SCALE, ARCH, folder=kernels)
    content = first.path.read_bytes()
    damage(first.path)
    assert compile_variant(SCALE, ARCH, folder=kernels) == first
    assert first.path.read_bytes() == content
    assert len(compilations) == 2
    assert compile_variant(SCALE, ARCH, folder=kernels) == first
    assert len(compilations) == 2


@pytest.mark.thorough
def test_processes_that_start_together_leave_one_sound_entry(kernels, kept, tmp_path):
    require_nvrtc()
    script = f"""
import time
from pathlib import Path
from gpuback._cuda import compiler
from gpuback._cuda.launch import Variant
compiler.load_nvrtc()
Path({str(tmp_path)!r}, f"ready").open("a").write(".")
while not Path({str(tmp_path)!r}, "go").exists():
    time.sleep(0.001)
print(compiler.compile_variant(Variant{tuple(SCALE)!r}, {ARCH!r}, folder=Path({str(kernels)!r})).path)
"""
    command = [sys.executable, "-W", "error", "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() or (tmp_path / "ready").stat().st_size < 4:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    (path,) = map(Path, paths)
    assert sorted(kept.iterdir()) == [path, path.with_suffix(".json")]
    assert cache.find(path.stem, ".cubin") is not None


def test_a_writer_that_fails_leaves_nothing_behind(kept, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"), pytest.raises(BackendError, match="GPUBACK_CACHE_DIR"):
        cache.keep("key", ".cubin", b"content", {})
    assert list(kept.iterdir()) == []


def test_leftovers_of_killed_writers_go_once_they_are_old(kept):
    kept.mkdir()
    young, old = (kept / f".gpuback-1-{digit * 16}.tmp" for digit in "ab")
    for file in (young, old):
        file.touch()
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    cache.keep("key", ".cubin", b"content", {})
    assert sorted(file.name for file in kept.iterdir()) == [young.name, "key.cubin", "key.json"]


@posix_only
def test_the_folder_is_private_to_the_user(kept, monkeypatch, tmp_path):
    path = cache.keep("key", ".cubin", b"content", {}).path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    monkeypatch.delenv("GPUBACK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = cache.keep("key", ".cubin", b"content", {}).path
    assert path == tmp_path / "xdg" / "gpuback" / "kernels" / "key.cubin"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o777)  # now anybody may have put a file there
    assert cache.find("key", ".cubin") is None
    cache.keep("key", ".cubin", b"content", {})
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert cache.find("key", ".cubin") is not None


@pytest.fixture
def others(monkeypatch):
    """Files are another user's from now on."""

    def make_others():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr(cache, "_ROOT", 54321)

    return make_others


@posix_only
def test_another_users_folder_is_not_used(kept, monkeypatch, tmp_path, others):
    monkeypatch.delenv("GPUBACK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache.keep("key", ".cubin", b"content", {})
    others()
    assert cache.find("key", ".cubin") is None
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        entry = cache.keep("key", ".cubin", b"content", {})
    assert not entry.path.is_relative_to(tmp_path)


@posix_only
def test_another_users_chosen_folder_is_an_error(kept, monkeypatch, others):
    cache.keep("key", ".cubin", b"content", {})
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(cache, "_ROOT", kept.stat().st_uid)
    if Path("/").stat().st_uid == cache._ROOT:
        assert cache.find("key", ".cubin") is not None  # an image's cache, say, that root filled
    others()
    for use in (lambda: cache.find("key", ".cubin"), lambda: cache.keep("key", ".cubin", b"content", {})):
        with pytest.raises(BackendError, match=r"GPUBACK_CACHE_DIR=.*belongs to another user.* Remedy: chmod go-w"):
            use()


@posix_only
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_chosen_folder_that_others_can_write_to_is_an_error(kept, mode):
    cache.keep("key", ".cubin", b"content", {})
    kept.chmod(mode)
    for use in (lambda: cache.find("key", ".cubin"), lambda: cache.keep("key", ".cubin", b"content", {})):
        with pytest.raises(BackendError, match=r"GPUBACK_CACHE_DIR=.*other users can write to .*kept, and what is in"):
            use()
    assert stat.S_IMODE(kept.stat().st_mode) & 0o777 == mode & 0o777
    kept.chmod(0o755)
    assert cache.find("key", ".cubin") is not None


@posix_only
@pytest.mark.parametrize(("mode", "safe"), [(0o777, False), (0o775, False), (0o1777, True), (0o755, True)])
def test_folders_above_count_too(kept, monkeypatch, mode, safe):
    """Whoever can write to one may put another folder in place of the next. The sticky bit keeps others from that."""
    kept.mkdir()
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(kept / "a" / "b"))
    kept.chmod(mode)
    if safe:
        assert cache.keep("key", ".cubin", b"content", {}).path.parent == kept / "a" / "b"
        assert stat.S_IMODE((kept / "a").stat().st_mode) == 0o700
        assert cache.find("key", ".cubin") is not None
    else:
        with pytest.raises(BackendError, match=r"other users can write to .*/kept, and"):
            cache.keep("key", ".cubin", b"content", {})
        assert list(kept.iterdir()) == []


@posix_only
def test_folders_that_a_link_leads_through_count_too(kept, monkeypatch, tmp_path):
    kept.mkdir(mode=0o700)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "link").symlink_to(kept)
    monkeypatch.setenv("GPUBACK_CACHE_DIR", str(tmp_path / "shared" / "link"))
    assert cache.keep("key", ".cubin", b"content", {}).path == kept / "key.cubin"
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(BackendError, match=r"other users can write to .*/shared, and"):
        cache.find("key", ".cubin")


@posix_only
@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("plant", ["link", "writable", "pipe", "another's"])
def test_an_entry_that_others_could_have_written_counts_as_absent(kept, monkeypatch, tmp_path, suffix, plant):
    monkeypatch.delenv("GPUBACK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = cache.keep("key", ".cubin", b"content", {}).path.parent
    file = folder / f"key{suffix}"
    elsewhere = tmp_path / "elsewhere"
    if plant == "link":
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
    elif plant == "writable":
        file.chmod(0o666)
    elif plant == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    else:
        pytest.skip("only root can give a file away")
    planted = elsewhere.read_bytes() if plant == "link" else None
    assert cache.find("key", ".cubin") is None
    cache.keep("key", ".cubin", b"content", {})
    assert cache.find("key", ".cubin") is not None
    assert not file.is_symlink()
    assert planted is None or elsewhere.read_bytes() == planted


@posix_only
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_what_another_user_planted_is_not_loaded_once_the_folder_is_private(kept, monkeypatch, tmp_path):
    monkeypatch.delenv("GPUBACK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = cache.keep("planted", ".cubin", b"machine code", {}).path.parent
    for file in folder.iterdir():
        os.chown(file, 12345, 12345)
    folder.chmod(0o777)
    assert cache.find("planted", ".cubin") is None
    cache.keep("another", ".cubin", b"content", {})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache.find("planted", ".cubin") is None
    assert cache.find("another", ".cubin") is not None


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"GPUBACK_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/xdg"}, "/mine"),
        ("linux", {"GPUBACK_CACHE_DIR": "~/mine"}, "/home/ada/mine"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/gpuback/kernels"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/ada/.cache/gpuback/kernels"),
        ("linux", {}, "/home/ada/.cache/gpuback/kernels"),
        ("darwin", {}, "/home/ada/Library/Caches/gpuback/kernels"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/gpuback/kernels"),
        ("win32", {}, "/home/ada/AppData/Local/gpuback/kernels"),
    ],
)
@posix_only
def test_each_platform_has_its_folder(monkeypatch, platform, environment, expected):
    for name in ("GPUBACK_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/ada"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache, "sys", SimpleNamespace(platform=platform))
    assert cache.folder() == Path(expected)


def test_a_folder_that_cannot_be_written_is_named_once_and_replaced_for_this_process(kernels, compilations, tmp_path):
    (tmp_path / "kept").write_text("a file, not a folder")
    with pytest.warns(RuntimeWarning, match=r"cannot be kept.*kept.*GPUBACK_CACHE_DIR"):
        first = compile_variant(SCALE, ARCH, folder=kernels)
    assert not first.path.is_relative_to(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_variant(SCALE, ARCH, folder=kernels) == first
        compile_variant(SCALE, "sm_80", folder=kernels)
    assert len(compilations) == 2
    if os.name == "posix":
        assert stat.S_IMODE(first.path.parent.stat().st_mode) == 0o700


def test_no_home_folder_is_no_obstacle(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GPUBACK_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(cache.Path, "home", nowhere)
    assert cache.find("key", ".cubin") is None
    with pytest.warns(RuntimeWarning, match="no home folder"):
        entry = cache.keep("key", ".cubin", b"content", {})
    assert cache.find("key", ".cubin") == entry


# --- the log of --ptxas-options=-v

CUDA_12 = """
ptxas info    : 0 bytes gmem, 24 bytes cmem[3]
ptxas info    : Compiling entry function 'layer' for 'sm_86'
ptxas info    : Function properties for layer
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 16 bytes cumulative stack size, 4096 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function 'update' for 'sm_86'
ptxas info    : Function properties for update
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 384 bytes cmem[0]
"""
CUDA_13 = """
kernel.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas warning : Value of threads per SM for entry k is out of range. .minnctapersm will be ignored
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'layer' for 'sm_90a'
ptxas info    : Function properties for layer
ptxas         .     592 bytes stack frame, 1040 bytes spill stores, 1044 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 592 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 41.267 ms
ptxas info    : Compiling entry function 'update' for 'sm_90a'
ptxas info    : Function properties for update
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers
"""
CALLED = """ptxas info    : Function properties for _Z3foofi
ptxas         .     48 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


def test_logs_of_cuda_12_and_13_are_read():
    assert parse_log(CUDA_12) == {
        "layer": Resources(255, 16, 8, 12, 4096, 2),
        "update": Resources(registers=40),
    }
    assert parse_log(CUDA_13) == {
        "layer": Resources(32, 592, 1040, 1044, 256, 1),
        "update": Resources(registers=31),
    }
    assert parse_log("") == {}


@pytest.mark.parametrize("log", [CUDA_13 + CALLED, CALLED + CUDA_13])
def test_what_a_called_function_spills_counts_for_every_kernel(log):
    assert parse_log(log) == {
        "layer": Resources(32, 592, 1044, 1052, 256, 1),
        "update": Resources(31, 48, 4, 8, 0, 0),
    }


def test_warnings_of_the_compiler_are_kept(kernels, compilations):
    source = 'extern "C" __global__ void k(float* x) { int unused; x[0] = 1; }\n'
    (kernels / "warns.cu").write_text(source)
    for _ in range(2):
        (warning,) = compile_variant(Variant("warns.cu", "k"), ARCH, folder=kernels).warnings
        assert "warns.cu(1)" in warning and "unused" in warning
