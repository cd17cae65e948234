#!/usr/bin/env bash
# On a machine with a GPU and no network: the machine, the tests compiled on the device, then the op against its peers.
# Each stage leaves its results under $APT_OUT (default bench/results/latest) as it ends. About nine minutes in all.
#   APT_STAGES="machine tests op"   which stages to run
#   APT_TEST_SECONDS, APT_OP_SECONDS   their budgets;  APT_SHAPES   gpu, cpu or tiny;  APT_ONLY   part of a shape's name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${APT_OUT:-bench/results/latest}"
stages="${APT_STAGES:-machine tests op}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1
failed=""

if [[ $stages == *machine* ]]; then
    { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no nvidia-smi"; } |
        tee "$out/machine.txt"
    python3 -c 'import apt_kernels, json; print(json.dumps(apt_kernels.info(), indent=1))' | tee -a "$out/machine.txt"
fi
if [[ $stages == *tests* ]]; then
    # The device's own cases first; then the kernel tests, which compile on the device where there is one.
    timeout "${APT_TEST_SECONDS:-270}" python3 -m pytest -q --maxfail=20 -n "${APT_WORKERS:-4}" \
        tests/test_cuda.py tests/test_triton*.py -p no:cacheprovider --junitxml "$out/tests.xml" 2>&1 |
        tee "$out/tests.log" | tail -n 40 || failed="$failed tests"
fi
if [[ $stages == *op* ]]; then
    timeout "$((${APT_OP_SECONDS:-200} + 60))" python3 -m bench.op ${APT_SHAPES:+--shapes "$APT_SHAPES"} \
        ${APT_ONLY:+--only "$APT_ONLY"} --seconds "${APT_OP_SECONDS:-200}" --out "$out/op.json" 2>&1 |
        tee "$out/op.log" || failed="$failed op"
fi
[[ -z $failed ]] || { echo "failed:$failed"; exit 1; }
