#!/usr/bin/env bash
# Check and measure gpuback on a GPU, from the bare source tree: needs CUDA and CuPy, and installs nothing.
#
#     OUT=folder [PARTS="compile parity benchmark"] benchmarks/on_device.sh [--quick] [--families step,layer]
#
# Compiles the kernels; runs the tests of ptx.cuh, of the backends' parity and of the reproducible mode's bits, then the
# benchmark with its report, and compute-sanitizer. PARTS picks some of these parts. At the end comes a table of them.
# All of it takes less than 9 minutes. Options are those of `python -m benchmarks`. OUT gets what each part printed, the
# benchmark's figures (JSON), tables (Markdown) and plots. Fails if a part fails.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:=on_device}" && cd "$OUT" && pwd)
export OUT PYTHONPATH=. PYTHONUNBUFFERED=1
export GPUBACK_CACHE_DIR=${GPUBACK_CACHE_DIR:-$(mktemp -d)}
python=${PYTHON:-python3}
summary=() failed=0

# part NAME SECONDS COMMAND...: at most so long; the last line of what it prints goes into the table.
part() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.txt"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] && local verdict=passed || { local verdict="FAILED ($code)"; failed=1; }
  summary+=("$(printf '%-12s %-12s %4d s   %s' "$name" "$verdict" $((SECONDS - started)) "$(tail -n 1 "$OUT/$name.txt" | cut -c 1-110)")")
}

pytest="$python -m pytest -q -p no:cacheprovider -W default"
workers=$($python -c 'import xdist' 2>/dev/null && echo "-n 6")
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
part compile 40 $python -m benchmarks.harness.compile_kernels
CUPY_TF32=1 part ptx 60 $pytest -s tests/gpu/test_ptx_on_gpu.py
CUPY_TF32=1 part parity 90 $pytest $workers tests/gpu/test_gpu_parity.py tests/gpu/test_gpu_graphs.py tests/gpu/test_gpu_training.py tests/backends/test_cuda_device.py -m gpu
CUPY_TF32=1 part bits 50 $pytest $workers tests/gpu/test_gpu_reproducible.py tests/core/test_elementary.py -m gpu
part benchmark 185 $python -m benchmarks --device cuda --seconds 165 --json "$OUT/benchmark.json" "$@"
[[ " ${PARTS:-} " == *" benchmark "* ]] && PARTS="$PARTS report"
plots=$($python -c 'import matplotlib' 2>/dev/null && echo yes)
part report 30 $python -m benchmarks report "$OUT/benchmark.json" ${plots:+--plots "$OUT"}
SECONDS_EACH=45 part sanitize 110 tests/gpu/kernels/sanitize.sh

echo
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"
exit $failed
