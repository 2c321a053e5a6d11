"""gpuback._cuda.sources: kernel files become one text, whose lines the compiler still names by file and number."""

import re

import pytest

from gpuback._cuda import sources
from gpuback._cuda.sources import flatten, kernels_folder
from gpuback.errors import BackendError


def write(folder, **files):
    for name, text in files.items():
        (folder / name.replace("_cuh", ".cuh").replace("_cu", ".cu")).write_text(text, encoding="utf-8")


def places(flat):
    """(file, line, text) of each line, as #line directives say."""
    name, number = None, 0
    for line in flat.splitlines():
        if match := re.fullmatch(r'#line (\d+) "(.+)"', line):
            name, number = match[2], int(match[1])
        else:
            yield name, number, line
            number += 1


def test_each_included_file_stands_once_and_every_line_keeps_its_place(tmp_path):
    files = {
        "a_cu": '// a\n#include "b.cuh"\n  #  include "c.cuh" // why\nint a;\n',
        "b_cuh": '#pragma once\n#include "c.cuh"\nint b; // ∂\n',
        "c_cuh": "#pragma once\nint c;",
    }
    write(tmp_path, **files)
    flat = list(places(flatten("a.cu", tmp_path)))
    assert [text for _, _, text in flat if text.startswith("int")] == ["int c;", "int b; // ∂", "int a;"]
    for name, number, text in flat:
        if text:
            assert (tmp_path / name).read_text(encoding="utf-8").splitlines()[number - 1] == text
    assert not any("pragma" in text or "include" in text for _, _, text in flat)


def test_the_emulators_includes_stay_for_the_compiler_to_skip(tmp_path):
    text = """#ifdef GPUBACK_EMULATOR
#if 1
#endif
#include "emulated.h"
#else
#define REAL_ONE
#endif
#if defined(GPUBACK_EMULATOR)  // as well
#include "emulated.h"
#endif
#ifndef GPUBACK_EMULATOR
#define REAL_TWO
#else
#include "emulated.h"
#endif
#include "c.cuh"
"""
    write(tmp_path, a_cu=text, c_cuh="int c;\n")
    flat = flatten("a.cu", tmp_path)
    assert flat.count('#include "emulated.h"') == 3
    assert "int c;" in flat and '#include "c.cuh"' not in flat


@pytest.mark.parametrize(
    "text",
    [
        '#if TILE == 64\n#include "c.cuh"\n#endif\n',
        '#ifndef GPUBACK_EMULATOR\n#include "c.cuh"\n#endif\n',
        '#ifdef GPUBACK_EMULATOR\n#else\n#include "c.cuh"\n#endif\n',
        '#if !defined(GPUBACK_EMULATOR)\n#include "c.cuh"\n#endif\n',
        '#ifdef GPUBACK_EMULATOR\n#elif 1\n#include "c.cuh"\n#endif\n',
    ],
)
def test_an_include_under_a_condition_is_refused(tmp_path, text):
    write(tmp_path, a_cu=text, c_cuh="int c;\n")
    with pytest.raises(BackendError, match=r"a\.cu, line \d: expected no #include between #if and #endif"):
        flatten("a.cu", tmp_path)


def test_an_include_is_looked_for_beside_its_file(tmp_path):
    (tmp_path / "inner").mkdir()
    write(tmp_path, a_cu='#include "inner/b.cuh"\n', c_cuh="int c;\n")
    write(tmp_path / "inner", b_cuh='#include "../c.cuh"\n#include "d.cuh"\n', d_cuh="int d;\n")
    flat = flatten("a.cu", tmp_path)
    assert "int c;" in flat and "int d;" in flat and '#line 1 "inner/d.cuh"' in flat


def test_a_missing_file_is_named_with_the_one_that_includes_it(tmp_path):
    write(tmp_path, a_cu='#include "gone.cuh"\n')
    with pytest.raises(BackendError, match=r"gone\.cuh, which a\.cu includes, is not in .*reinstall"):
        flatten("a.cu", tmp_path)
    with pytest.raises(BackendError, match=r"none\.cu is not in"):
        flatten("none.cu", tmp_path)


def test_files_that_include_each_other_are_named(tmp_path):
    write(tmp_path, a_cu='#include "b.cuh"\n', b_cuh='#include "c.cuh"\n', c_cuh='#include "b.cuh"\n')
    with pytest.raises(BackendError, match=re.escape("a.cu -> b.cuh -> c.cuh -> b.cuh")):
        flatten("a.cu", tmp_path)


def test_kernels_are_looked_for_inside_the_package_and_then_beside_it(tmp_path, monkeypatch):
    module = tmp_path / "site" / "gpuback" / "cuda" / "sources.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(sources, "__file__", str(module))
    inside, beside = module.parents[1] / "kernels", module.parents[2] / "kernels"
    with pytest.raises(BackendError, match=re.escape(f"{inside} or {beside}")):
        kernels_folder()
    for folder in (beside, inside):
        folder.mkdir()
        write(folder, other_py="")
        with pytest.raises(BackendError) if folder is beside else pytest.MonkeyPatch.context():
            kernels_folder()
        (folder / "common").mkdir()
        write(folder / "common", ptx_cuh="")
        assert kernels_folder() == folder


def test_every_kernel_of_gpuback_becomes_one_text():
    files = sorted(kernels_folder().rglob("*.cu"))
    assert files
    for file in files:
        flat = flatten(file.relative_to(kernels_folder()).as_posix())
        left = {line for line in flat.splitlines() if "#include" in line}
        assert left in ({'#include "emulated_ptx.h"'}, {'#include "emulated_ptx.h"', '#include "emulated_ptx_sm90.h"'})
