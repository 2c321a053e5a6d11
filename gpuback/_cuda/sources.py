"""Find kernel sources, and flatten each into the one text that NVRTC compiles and the cache hashes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gpuback.errors import BackendError

_EVERY_KERNEL_INCLUDES = "common/ptx.cuh"
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
_IF = re.compile(r"\s*#\s*if(?P<negated>n?def\b|\b)(?P<condition>.*)")
_ELSE = re.compile(r"\s*#\s*el(se|if|ifdef|ifndef)\b")
_ENDIF = re.compile(r"\s*#\s*endif\b")
_COMMENT = re.compile(r"//[^\n]*")
# Between the two stand __launch_bounds__(…) and the like, or a macro for them.
_DECLARATION = r"\bKERNEL\s+(?:\w+\s*\([^()]*\)\s*)*?(\w+)\s*\(([^()]*)\)\s*\{"
_KERNEL = re.compile(_DECLARATION)
_KERNEL_MACRO = re.compile(rf"^#define (\w+)\(([^()]*)\).*?{_DECLARATION}", re.MULTILINE)
_EMULATOR = re.compile(r"(defined\s*\(?\s*)?GPUBACK_EMULATOR\b")


def kernels_folder() -> Path:
    """Find the folder of the kernels: inside the package where it was installed from a wheel, else beside it.

    Raises:
        BackendError: there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "kernels", package.parent / "kernels")
    for folder in candidates:
        if (folder / _EVERY_KERNEL_INCLUDES).is_file():  # other packages, too, are called kernels
            return folder
    raise BackendError(
        f"gpuback's kernel sources: expected them in {candidates[0]} or {candidates[1]}, found neither; "
        "reinstall gpuback"
    )


def flatten(name: str, folder: Path | None = None) -> str:
    """Put what a kernel file includes in the includes' places, each file once.

    `#line` directives keep the compiler's messages at the files' own names and lines. Includes of the emulator's build
    (under GPUBACK_EMULATOR) stay as they are, for the compiler skips them.

    Args:
        name: a file of the folder, such as "layer/layer_simt.cu".
        folder: gpuback's kernels by default.

    Raises:
        BackendError: a file is missing, files include each other in a circle, or an include stands under a condition
            (flattened it would hold for all of what follows).
    """
    folder = kernels_folder() if folder is None else folder
    return "".join(f"{line}\n" for line in _lines(folder, name, (), set()))


def parameter_names(source: str, entry: str) -> tuple[str, ...]:
    """Read the names of a kernel's parameters from its KERNEL line in a flat source.

    A macro may declare kernels, too, whose names it is given: `#define MACRO(name, …) KERNEL name(…) {…}`.

    Raises:
        BackendError: there is no KERNEL of that name.
    """
    text = _COMMENT.sub("", source).replace("\\\n", " ")
    for name, parameters in _KERNEL.findall(text):
        if name == entry:
            return _names(parameters)
    for macro, arguments, name, parameters in _KERNEL_MACRO.findall(text):
        place = _names(arguments).index(name)
        calls = re.findall(rf"^{macro}\(([^()]*)\)", text, re.MULTILINE)
        if entry in (call.split(",")[place].strip() for call in calls):
            return _names(parameters)
    raise BackendError(f"kernel sources: expected a KERNEL named {entry!r}, found none; reinstall gpuback")


def _names(parameters: str) -> tuple[str, ...]:
    """Return the last word of each declaration."""
    return tuple(re.findall(r"\w+", parameter)[-1] for parameter in parameters.split(",") if parameter.strip())


def _lines(folder: Path, name: str, above: tuple[str, ...], done: set[str]) -> Iterator[str]:
    name = str(PurePosixPath(name))
    if name in above:
        raise BackendError(f"kernel sources include each other in a circle: {' -> '.join((*above, name))}")
    if name in done:
        return
    done.add(name)
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        by = f", which {above[-1]} includes," if above else ""
        raise BackendError(f"kernel source {name}{by} is not in {folder}; reinstall gpuback") from error
    conditions: list[str] = []
    yield f'#line 1 "{name}"'
    for number, line in enumerate(text.splitlines(), 1):
        if include := _INCLUDE.match(line):
            if "emulator" in conditions:
                yield line
                continue
            if conditions:
                raise BackendError(f"{name}, line {number}: expected no #include between #if and #endif, got {line!r}")
            yield from _lines(folder, _beside(name, include[1]), (*above, name), done)
            yield f'#line {number + 1} "{name}"'
        elif _PRAGMA_ONCE.match(line):
            yield ""
        else:
            _follow(line, conditions)
            yield line


def _beside(includer: str, included: str) -> str:
    """Return the included file's name as seen from the folder; ".." goes up one level."""
    parts: list[str] = []
    for part in (PurePosixPath(includer).parent / included).parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _follow(line: str, conditions: list[str]) -> None:
    """Track for each open #if whether its current branch is the emulator's."""
    if match := _IF.match(line):
        for_emulator = _EMULATOR.fullmatch(match["condition"].split("//")[0].strip().rstrip(") ")) is not None
        conditions.append(
            "emulator" if for_emulator and match["negated"] != "ndef" else "not" if for_emulator else "if"
        )
    elif _ELSE.match(line) and conditions:
        conditions[-1] = "emulator" if conditions[-1] == "not" else "if"
    elif _ENDIF.match(line) and conditions:
        conditions.pop()
