"""Compile every kernel for this machine's GPU, on all its processors, so that later runs find them in the cache."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from gpuback._cuda.compiler import compile_variant
from gpuback._cuda.device import CudaLauncher
from gpuback._gates.checks import exists_for
from gpuback._gates.variants import every_kernel


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.harness.compile_kernels", description=__doc__).parse_args()
    arch = CudaLauncher().limits.arch
    wanted = [kernel.variant for kernel in every_kernel() if exists_for(kernel.variant, arch)]
    started = time.perf_counter()
    # Spawned: in a forked process, the inherited CUDA context does not work.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), context) as pool:
        compiled = list(pool.map(partial(compile_variant, arch=arch), wanted))
    spilled = sum(one.resources.spill_store_bytes > 0 for one in compiled)
    print(f"{len(compiled)} kernels for {arch} in {time.perf_counter() - started:.1f} s, {spilled} of them spill")


if __name__ == "__main__":
    main()
