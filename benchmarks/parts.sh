# Parts of a script for a device: each with a time limit, a verdict in a table at the end, and its output in one log.
# Sourced by on_device.sh and on_hopper.sh, from the root of the source tree, with PARTS and OUT as they were given.
set -u
OUT=$(mkdir -p "${OUT:=on_device}" && cd "$OUT" && pwd)
export OUT PYTHONPATH=. PYTHONUNBUFFERED=1
export GPUBACK_CACHE_DIR=${GPUBACK_CACHE_DIR:-$(mktemp -d)}
python=${PYTHON:-python3}
pytest="$python -m pytest -q -p no:cacheprovider -W default"
workers=$($python -c 'import xdist' 2>/dev/null && echo "-n 6")
summary=() failed=0 printed=$(mktemp)

# part NAME SECONDS COMMAND...: at most so long, and no longer than BUDGET leaves (seconds from the start of the script).
# The last line of what it prints goes into the table. The command finds its limit, less 3 s, in PART_SECONDS. It is
# interrupted, so that pytest still tells what failed; what goes on for 8 s after that is killed.
part() {
  local name=$1 limit=$2 started=$SECONDS code verdict left=$((${BUDGET:-86400} - SECONDS))
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    summary+=("$(printf '%-14s left out for lack of time' "$name")")
    return 0
  fi
  echo "== $name" | tee -a "$OUT/log.txt"
  PART_SECONDS=$((limit - 3)) timeout -s INT -k 8 "$limit" "$@" 2>&1 | tee "$printed" | tee -a "$OUT/log.txt"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] && verdict=passed || { verdict="FAILED ($code)"; failed=1; }
  summary+=("$(printf '%-14s %-12s %4d s   %s' "$name" "$verdict" $((SECONDS - started)) "$(tail -n 1 "$printed" | cut -c 1-110)")")
  printf '%s\n' "${summary[@]}" >"$OUT/summary.txt"
}

# finish: prints the table, and exits with 1 if a part failed.
finish() {
  echo
  printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"
  exit $failed
}

# ---- Parts of both scripts

compile_kernels() { part compile "$1" $python -m benchmarks.harness.compile_kernels; } # SECONDS

backend_tests="tests/gpu/test_gpu_parity.py tests/gpu/test_gpu_graphs.py tests/gpu/test_gpu_training.py
  tests/gpu/test_gpu_vjp.py tests/gpu/test_gpu_streaming.py tests/backends/test_cuda_device.py
  $($python -c 'import torch' 2>/dev/null && echo tests/peers/test_torch_module.py)"
parity() { CUPY_TF32=1 part "$1" "$2" $pytest $workers $backend_tests -m gpu; } # NAME SECONDS
