"""Results of a benchmark: figures of every round by contestant, stored as JSON, and figures computed from them.

Only measured figures are stored. Medians, spreads, ratios and fractions of the roofline are functions of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.cases import Case
from benchmarks.peers import OURS as OURS
from benchmarks.peers import Role as Role

FORMAT = 1

IN_CACHE = 32 << 20
"""Bytes up to which a CPU's caches may hold a case."""


class ResultsError(ValueError):
    """A file is not what this module writes; the message says where and why."""


@dataclass
class Environment:
    """Machine, commit and versions that figures belong to.

    Attributes:
        device: the processor or GPU, as it calls itself.
        cores: cores that the process may use, or a GPU's multiprocessors.
        commit: commit of gpuback's source tree, if that is known.
        date: ISO 8601.
        versions: package → version.
        blas: library, version, kernel and threads of NumPy's matrix products.
    """

    device: str
    kind: Literal["cpu", "gpu"]
    cores: int
    commit: str | None
    date: str
    versions: dict[str, str]
    blas: str


@dataclass
class Figures:
    """Figures of one contestant in a row.

    Attributes:
        rounds: seconds for one call (or bytes), a figure a round.
        setting: threads, flags and environment that it ran with.
    """

    rounds: list[float]
    setting: str
    role: Role


@dataclass
class Row:
    """One case, with its contestants' figures.

    Attributes:
        family: the kind of work.
        case: its name; family, case, label and dtype together say which row it is.
        label: sizes, batch size and what else belongs to the case, for people.
        flops: operations of the products that every way of computing it needs.
        bytes: bytes that every way of computing it must read or write.
        unit: unit of the rounds, seconds or bytes.
        absent: contestant → why it was not measured.
    """

    family: str
    case: str
    label: str
    sizes: list[int]
    batch_size: int
    dtype: str
    flops: int
    bytes: int
    unit: Literal["s", "bytes"]
    contestants: dict[str, Figures] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def row_of(case: Case) -> Row:
    """Make a row without figures."""
    return Row(
        family=case.family,
        case=case.name,
        label=case.label,
        sizes=list(case.sizes),
        batch_size=case.batch_size,
        dtype=case.dtype,
        flops=case.flops,
        bytes=case.bytes,
        unit="bytes" if case.unit == "bytes" else "s",
    )


@dataclass
class Results:
    """Figures of a run.

    Attributes:
        ceilings: rates that the device reached in this run: "copy" (bytes read and written per second), on a CPU
            "cached copy" too, and by dtype the operations per second of a large matrix product.
        notes: paragraphs on what is special about these figures, for people.
    """

    environment: Environment
    ceilings: dict[str, float]
    rows: list[Row]
    notes: list[str] = field(default_factory=list, metadata={"may be missing": True})


# ---- Figures that follow


def median(figures: Figures) -> float:
    return percentile(figures, 50)


def p20(figures: Figures) -> float:
    return percentile(figures, 20)


def p80(figures: Figures) -> float:
    return percentile(figures, 80)


def percentile(figures: Figures, percent: float) -> float:
    return float(np.percentile(figures.rounds, percent))


def best_peer(row: Row) -> str | None:
    """Find the peer with the lowest median."""
    peers = {name: median(one) for name, one in row.contestants.items() if one.role == "peer"}
    return min(peers, key=peers.__getitem__, default=None)


def ratio(row: Row, other: str | None = None, to: str = OURS) -> float | None:
    """Divide `other` by `to`: the median over rounds of the quotient in a round.

    Args:
        row: row of both.
        other: a contestant; the best peer by default.
        to: contestant that it is divided by.

    Returns:
        Above 1 where `to` is better; None if one of them was not measured.
    """
    other = best_peer(row) if other is None else other
    if other not in row.contestants or to not in row.contestants:
        return None
    pairs = zip(row.contestants[other].rounds, row.contestants[to].rounds, strict=False)
    quotients = [above / below for above, below in pairs if below > 0]
    return float(np.median(quotients)) if quotients else None


def floor(row: Row, ceilings: dict[str, float]) -> float | None:
    """Compute the least seconds of a case, the larger of two times.

    One is that of its bytes at the rate of a copy, the other that of its operations at the rate of a large product. A
    case that a CPU's caches may hold is given the rate of a copy within them. The result is None where a ceiling is
    missing or nothing is counted.
    """
    if row.unit != "s" or not (row.bytes or row.flops):
        return None
    copy = ceilings.get("cached copy" if row.bytes <= IN_CACHE else "copy", ceilings.get("copy"))
    rate = ceilings.get(row.dtype)
    if copy is None or (rate is None and row.flops):
        return None
    return max(row.bytes / copy, row.flops / rate if rate else 0.0)


def roofline(row: Row, ceilings: dict[str, float], name: str = OURS) -> float | None:
    """Divide the floor by the time that a contestant took: 1 is as fast as can be."""
    least = floor(row, ceilings)
    return None if least is None or name not in row.contestants else least / median(row.contestants[name])


# ---- Files


def save(path: str | os.PathLike[str], results: Results) -> None:
    """Write beside `path`, then rename, so that readers always find a complete file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    content = {"format": FORMAT, **dataclasses.asdict(results)}
    if not results.notes:
        del content["notes"]
    try:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Results:
    """Read what `save` wrote.

    Raises:
        OSError: the file cannot be read.
        ResultsError: the file holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: expected JSON, got what does not parse: {error}") from error
    try:
        return from_json(content)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None


def from_json(content: Any) -> Results:
    """Make results from the content of a JSON file."""
    if not isinstance(content, dict):
        raise ResultsError(f"expected an object, got {_shown(content)}")
    if content.get("format") != FORMAT:
        raise ResultsError(f"format: expected {FORMAT}, got {_shown(content.get('format'))}")
    results = _read(Results, {name: value for name, value in content.items() if name != "format"}, "")
    assert isinstance(results, Results)
    for index, row in enumerate(results.rows):
        for name, contestant in row.contestants.items():
            where = f"rows[{index}].contestants[{name!r}].rounds"
            if not contestant.rounds:
                raise ResultsError(f"{where}: expected a figure or more, got none")
            if not all(np.isfinite(figure) and figure >= 0 for figure in contestant.rounds):
                raise ResultsError(f"{where}: expected finite figures ≥ 0, got {_shown(contestant.rounds)}")
    return results


def _read(kind: Any, value: Any, where: str) -> Any:
    """Convert `value` to the type that a field declares."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_fields(typing.cast(type, kind), value, where)
    if origin is Literal:
        return _require(value in arguments, value, where, f"one of {', '.join(map(repr, arguments))}")
    if origin is types.UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if origin is list:
        _require(isinstance(value, list), value, where, "a list")
        return [_read(arguments[0], one, f"{where}[{index}]") for index, one in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, dict), value, where, "an object")
        return {name: _read(arguments[1], one, f"{where}[{name!r}]") for name, one in value.items()}
    if kind is float:
        return float(
            _require(isinstance(value, (int, float)) and not isinstance(value, bool), value, where, "a number")
        )
    what = {int: "an integer", str: "a string"}[kind]
    return _require(isinstance(value, kind) and not isinstance(value, bool), value, where, what)


def _read_fields(kind: type, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), value, where or "content", "an object")
    hints = typing.get_type_hints(kind)
    may_be_missing = {one.name for one in dataclasses.fields(kind) if "may be missing" in one.metadata}
    for name in (name for name in hints if name not in may_be_missing):
        _require(name in value, value, where or "content", f"a field {name!r}")
    _require_known(value, tuple(hints), where)
    return kind(
        **{
            name: _read(hint, value[name], f"{where}.{name}" if where else name)
            for name, hint in hints.items()
            if name in value
        }
    )


def _require_known(value: dict[str, Any], names: Sequence[str], where: str) -> None:
    for name in value:
        if name not in names:
            raise ResultsError(f"{where or 'content'}: expected fields {', '.join(names)}, got {name!r}")


def _require(condition: bool, value: Any, where: str, expected: str) -> Any:
    if not condition:
        raise ResultsError(f"{where}: expected {expected}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "…"
