"""Compile kernels for any GPU, without one, and print what each kernel takes.

The table has registers, shared memory, occupancy, spills and matrix instructions. The exit status is 1 if a kernel has
a fault: it spills registers, keeps anything on a stack, claims tensor cores but has no matrix instruction (a kernel for
Hopper: no HGMMA), if ptxas has undone the overlap of its matrix products or its changes of registers, or if it closes
groups of products that may be empty. Kernels for Hopper exist for sm_90a only.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from gpuback._cuda.compiler import compile_variant, load_nvrtc
from gpuback._gates.checks import (
    ARCHS,
    FULL_ARCHS,
    HOPPER_ARCH,
    SAMPLED_ARCHS,
    Case,
    check_pairs,
    exists_for,
    name_of,
    pairs_of,
    sample,
)
from gpuback._gates.disassembly import sass
from gpuback._gates.table import print_table
from gpuback.errors import GpubackError

_EXAMPLES = """examples:
  python -m gpuback._gates                                      all kernels; two variants of each on rarer GPUs
  python -m gpuback._gates --kernel layer_simt --list           the variants of one kernel
  python -m gpuback._gates --kernel layer_simt --arch sm_90a    their registers, shared memory and spills
  python -m gpuback._gates --kernel layer_simt float TILE=128 --arch sm_90a --sass
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpuback._gates",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        metavar="FRAGMENT",
        help="only kernels whose names contain all of these, e.g. --kernel layer_simt TILE=64",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arch", help=f"only these architectures, separated by commas; known: {','.join(ARCHS)}")
    which.add_argument(
        "--all",
        action="store_true",
        help="every kernel for every architecture; without it and without --kernel and --arch, "
        f"{','.join(FULL_ARCHS)} get every kernel and {','.join(SAMPLED_ARCHS)} two variants of each",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="print the kernels' names and compile nothing")
    shown.add_argument(
        "--sass", action="store_true", help="print the machine code too; for one kernel and one architecture"
    )
    return parser


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """Run the command; return its exit status, 0 if every kernel is sound."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if cases is None:
        from gpuback._gates.variants import every_kernel

        cases = every_kernel()
    if options.kernel:
        cases = [case for case in cases if all(fragment in name_of(case.variant) for fragment in options.kernel)]
    names = [name_of(case.variant) for case in cases]
    if not cases:
        parser.error(f"no kernel has a name with {' and '.join(options.kernel)} in it; --list prints all names")
    if options.list:
        print("\n".join(names))
        return 0
    pairs = _pairs(cases, options)
    if not pairs:
        parser.error(
            f"for {options.arch} there is none of these kernels, which exist for {HOPPER_ARCH} only:\n  "
            + "\n  ".join(names)
        )
    if options.sass and len(pairs) != 1:
        parser.error("--sass needs one kernel and one --arch, these match:\n  " + "\n  ".join(names))
    try:
        rows = check_pairs(pairs)
        code = (
            sass(compile_variant(cases[0].variant, options.arch).path, cases[0].variant.entry) if options.sass else ""
        )
    except GpubackError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(rows)
    if options.arch:
        _tell_left_out(cases, options.arch.split(","))
    for row in rows:
        for warning in row.warnings:
            print(f"{row.name} {row.arch}: {warning}")
    if code:
        print(code)
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"{row.name} {row.arch}: {'; '.join(row.faults)}", file=sys.stderr)
    version = ".".join(map(str, load_nvrtc()[1]))
    print(f"{len(rows)} kernels compiled, {len(faulty)} with faults (NVRTC {version})")
    return 1 if faulty else 0


def _tell_left_out(cases: Sequence[Case], archs: Sequence[str]) -> None:
    for arch in archs:
        count = sum(not exists_for(case.variant, arch) for case in cases)
        if count:
            print(f"{count} {'kernel' if count == 1 else 'kernels'} for {HOPPER_ARCH} only: left out of {arch}")


def _pairs(cases: Sequence[Case], options: argparse.Namespace) -> list[tuple[Case, str]]:
    """Choose what to compile for which architecture."""
    if options.arch:
        return pairs_of(cases, options.arch.split(","))
    if options.all:
        return pairs_of(cases, ARCHS)
    pairs = pairs_of(cases, FULL_ARCHS)
    if not options.kernel:
        pairs += pairs_of(sample(cases), SAMPLED_ARCHS)
    return pairs


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… --sass | head` ends without a traceback
    sys.exit(main())
