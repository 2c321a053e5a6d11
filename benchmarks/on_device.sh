#!/usr/bin/env bash
# Check and measure gpuback on a GPU, from the bare source tree: needs CUDA and CuPy, and installs nothing.
#
#     OUT=folder [PARTS="compile parity benchmark"] benchmarks/on_device.sh [--quick] [--families step,layer]
#
# Compiles the kernels; runs the tests of ptx.cuh, of the backends' parity and of the reproducible mode's bits, then the
# benchmark with its report, and compute-sanitizer. PARTS picks some of these parts. At the end comes a table of them.
# All of it takes less than 9 minutes. Options are those of `python -m benchmarks`. OUT gets a log of what was printed,
# the benchmark's figures (JSON), tables (Markdown) and plots. Fails if a part fails.
cd "$(dirname "$0")/.."
. benchmarks/parts.sh

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
compile_kernels 40
CUPY_TF32=1 part ptx 70 $pytest -s tests/gpu/test_ptx_on_gpu.py tests/gpu/test_ptx_sm90_on_gpu.py -m gpu
parity parity 90
CUPY_TF32=1 part bits 50 $pytest $workers tests/gpu/test_gpu_reproducible.py tests/core/test_elementary.py -m gpu
part benchmark 185 $python -m benchmarks --device cuda --seconds 165 --json "$OUT/benchmark.json" "$@"
[[ " ${PARTS:-} " == *" benchmark "* ]] && PARTS="$PARTS report"
plots=$($python -c 'import matplotlib' 2>/dev/null && echo yes)
part report 30 $python -m benchmarks report "$OUT/benchmark.json" ${plots:+--plots "$OUT"}
SECONDS_EACH=45 part sanitize 110 tests/gpu/kernels/sanitize.sh
finish
