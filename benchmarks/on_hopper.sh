#!/usr/bin/env bash
# Check and measure the kernels for Hopper on a GPU of compute capability 9.0, from the bare source tree, in ten minutes.
#
#     OUT=folder [BUDGET=570] [PARTS="compile ptx checks"] benchmarks/on_hopper.sh
#
# The parts come in the order that settles most first: compile and machine (rates, clusters that fit), ptx (each
# instruction), checks (layers and networks against float64, in processes that may hang), sanitize (memcheck over the
# bfloat16 kernels), parity and hopper-parity (the backends' tests, without these kernels and with them), layers,
# networks and forward (times beside other libraries), knobs (layers with other constants of their plans), profile (Nsight
# Compute). BUDGET is in seconds. Parts for which no time is left are named. OUT gets a log of what was printed,
# hopper.jsonl with a line for each row as soon as it is measured, and its tables in hopper.md. Fails if a part fails.
cd "$(dirname "$0")/.."
BUDGET=${BUDGET:-570}
. benchmarks/parts.sh
log=$OUT/hopper.jsonl
rows="$python -m benchmarks.hopper run --log $log"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
compile_kernels 70
part machine 30 $rows machine
part ptx 80 $rows ptx
part checks 90 $rows checks
GPUBACK_HOPPER=1 SECONDS_EACH=40 part sanitize 45 tests/gpu/kernels/sanitize.sh bfloat16
parity parity 60
GPUBACK_HOPPER=1 parity hopper-parity 60
part layers 110 $rows layers
part networks 110 $rows networks
part forward 40 $rows forward
part knobs 60 $rows knobs
part profile 60 $python -m benchmarks.hopper profile "$log"
[ -n "${PARTS:-}" ] && PARTS="$PARTS report"
BUDGET=$((SECONDS + 15)) part report 15 $python -m benchmarks.hopper report "$log"
finish
