#!/usr/bin/env bash
# compute-sanitizer over every kernel: accesses out of bounds and misaligned (memcheck), races in shared memory (racecheck).
# A machine without the tool, or one that refuses it, is reported; only what the tool finds makes this fail.
#
#     PYTHON=python3 OUT=folder SECONDS_EACH=90 tests/gpu/kernels/sanitize.sh [DTYPE]
#
# With a dtype: memcheck over the kernels of this dtype alone.
set -u
cd "$(dirname "$0")/../../.."
export PYTHONPATH=. CUPY_TF32=1
out=${OUT:-$(mktemp -d)} limit=${SECONDS_EACH:-90} python=${PYTHON:-python3}
script=tests/gpu/kernels/every_kernel.py
tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
if [ -z "$tool" ]; then
  echo "sanitize: compute-sanitizer is not installed; it comes with the CUDA toolkit"
  exit 0
fi

# check TOOL [DTYPE]: what the tool says goes into a file, the verdict on standard output.
check() {
  local log=$out/$1${2:+-$2}.txt name="$1${2:+ $2}" code summary complaint
  timeout "$limit" "$tool" --tool "$1" --error-exitcode 42 --print-limit 20 "$python" $script ${2:-} >"$log" 2>&1
  code=$?
  summary=$(grep -aoE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1)
  complaint=$(grep -am 1 -E '^=========.*(Invalid|Misaligned|hazard|[Rr]ace|[Ee]rror:)' "$log")
  if [ $code = 124 ]; then
    echo "$name: stopped after $limit s, ${complaint:-nothing found so far}"
    [ -z "$complaint" ]
  elif [ -z "$summary" ] || ! grep -aq '^ran ' "$log"; then
    echo "$name: this machine refuses it: $(grep -am 1 '=========' "$log")"
  else
    echo "$name: $summary, $(grep -a '^ran ' "$log")"
    [ $code = 0 ]
  fi
}

if [ $# -gt 0 ]; then
  check memcheck "$1"
  exit
fi
"$python" $script || exit 1  # compiles, and shows what fails without the tool's help
found=0
check memcheck || found=1
jobs=()
for dtype in bfloat16 float16 tf32 float32 float64; do  # racecheck is slow: one process each
  check racecheck $dtype &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || found=1; done
[ $found = 0 ] && echo "compute-sanitizer found nothing; its files are in $out" || echo "compute-sanitizer found errors: $out"
exit $found
