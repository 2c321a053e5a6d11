#!/usr/bin/env bash
# compute-sanitizer over every kernel: accesses out of bounds and misaligned (memcheck), races in shared memory (racecheck).
# A machine without the tool, or one that refuses it, is reported; only what the tool finds makes this fail.
#
#     PYTHON=python3 OUT=folder tests/gpu_kernels/sanitize.sh
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH=. CUPY_TF32=1
tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
if [ -z "$tool" ]; then
  echo "sanitize: compute-sanitizer is not installed; it comes with the CUDA toolkit"
  exit 0
fi
script=tests/gpu_kernels/every_kernel.py
${PYTHON:-python3} $script || exit 1
found=0
verdicts=()
for check in memcheck racecheck; do
  log=${OUT:-$(mktemp -d)}/$check.txt
  timeout "${SECONDS_EACH:-90}" "$tool" --tool $check --error-exitcode 42 --print-limit 20 ${PYTHON:-python3} $script >"$log" 2>&1
  code=$?
  summary=$(grep -aoE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1)
  complaint=$(grep -am 1 -E '^=========.*(Invalid|Misaligned|hazard|[Rr]ace|error)' "$log")
  if [ $code = 124 ]; then
    verdicts+=("$check: stopped after ${SECONDS_EACH:-90} s; ${complaint:-nothing found so far}")
    [ -z "$complaint" ] || found=1
  elif [ -z "$summary" ] || ! grep -aq '^ran ' "$log"; then
    verdicts+=("$check: this machine refuses it: $(grep -am 1 '=========' "$log")")
  else
    verdicts+=("$check: $summary; $(grep -a '^ran ' "$log")")
    [ $code = 0 ] || found=1
  fi
  echo "${verdicts[-1]}"
done
(IFS=';'; echo "${verdicts[*]}")
exit $found
