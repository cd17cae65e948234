#!/usr/bin/env bash
# On a machine with a GPU and no network: the machine line, the GPU tests, then the benchmark. At most nine minutes.
# Each stage writes its results to $APT_OUT when it ends (default: $OUT, or else bench/results/latest). To run a subset:
#   APT_STAGES      default: library machine tests, the stages of `python -m bench speed --list-stages`, table
#                   (one or more of them, in this order); optional, after tests: sanitizer (memcheck and racecheck of
#                   the CUDA library, 300 s)
#   APT_MINUTES     for everything (default 9);  APT_TEST_SECONDS  for the tests (default 170)
#   APT_TESTS       what pytest runs;  APT_WORKERS  processes of it (default 4)
#   APT_ONLY        part of a case's name;  APT_PEERS  peers, separated by commas;  APT_SECONDS  for each stage
#   APT_TUNE        seconds of `python -m bench compiled tune`; unset: no search
#   APT_REGISTRY    gpu, small_gpu, cpu or tiny (default: by the device and its memory), or predicted: the cases of
#                   `python -m bench compiled predict`, whose tables are then written to $APT_OUT/predictions with the times
#   APT_DEVICE      cuda or cpu;  APT_COMMIT  the commit, where there is no git
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${APT_OUT:-${OUT:-bench/results/latest}}"
python="${PYTHON:-python3}"
end=$((SECONDS + $(printf '%.0f' "$(echo "${APT_MINUTES:-9}" | awk '{print $1 * 60}')")))
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=""
benchmarks="$("$python" -m bench speed --list-stages)" || { echo "python -m bench speed does not start" >&2; exit 1; }
stages=" ${APT_STAGES:-library machine tests $benchmarks table} "

left() { echo $((end - SECONDS - 10)); }
wanted() { [[ $stages == *" $1 "* ]]; }

if wanted library; then
    # For this chip alone; where there is no nvcc it says so, and info() below says that the library is not there.
    chip="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)"
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$chip}" timeout "${APT_BUILD_SECONDS:-150}" "$python" csrc/build.py \
        > "$out/library.log" 2>&1 || tail -n 3 "$out/library.log"
fi
if wanted machine; then
    { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no nvidia-smi"; } |
        tee "$out/machine.txt"
    "$python" -c 'import apt_kernels, json; print(json.dumps(apt_kernels.info()))' | tee -a "$out/machine.txt"
fi
if wanted tests; then
    # The device's own cases first; then the kernel tests, which compile on the device where there is one.
    workers="${APT_WORKERS:-4}"
    "$python" -c 'import xdist' 2>/dev/null || workers=""
    timeout "${APT_TEST_SECONDS:-170}" "$python" -m pytest -q --maxfail=20 ${workers:+-n "$workers"} \
        ${APT_TESTS:-tests/impl/cuda/test_cuda.py tests/impl/triton} -p no:cacheprovider --junitxml "$out/tests.xml" \
        > "$out/tests.log" 2>&1 || failed="$failed tests"
    tail -n 5 "$out/tests.log"
fi
if wanted sanitizer; then
    PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" timeout "${APT_SANITIZER_SECONDS:-300}" \
        env PYTHONPATH=.:tests "$python" -m helpers.sanitize memcheck racecheck > "$out/sanitizer.log" 2>&1 || failed="$failed sanitizer"
    tail -n 3 "$out/sanitizer.log"
fi
[[ -z ${APT_TUNE:-} ]] || "$python" -m bench compiled tune --seconds "$APT_TUNE" --out "$out/tune.json" > "$out/tune.log" 2>&1 || failed="$failed tune"
then=" $benchmarks"
for stage in $benchmarks; do
    then="${then/ $stage/}"
    wanted "$stage" || continue
    others="$(for other in $then; do wanted "$other" && echo "$other"; done)"
    if (($(left) < 20)); then
        echo "$stage: no time left"
        failed="$failed $stage"
        continue
    fi
    timeout "$(left)" "$python" -m bench speed --stage "$stage" --out "$out/json" --details \
        --within "$(left)" ${others:+--then $others} \
        ${APT_REGISTRY:+--registry "$APT_REGISTRY"} ${APT_DEVICE:+--device "$APT_DEVICE"} ${APT_ONLY:+--only "$APT_ONLY"} \
        ${APT_PEERS:+--peers "$APT_PEERS"} ${APT_SECONDS:+--seconds "$APT_SECONDS"} \
        > "$out/$stage.log" 2>&1 || failed="$failed $stage"
    grep -E "^$stage: |passed|FAILED" "$out/$stage.log" | tail -n 12
done
if wanted table && compgen -G "$out/json/*.json" > /dev/null; then
    "$python" -m bench report "$out/json" --out "$out" | tee "$out/table.txt" | cut -c1-"${COLUMNS:-220}"
fi
if [[ ${APT_REGISTRY:-} == predicted ]] && compgen -G "$out/json/*.json" > /dev/null; then
    "$python" -m bench compiled predict --measured "$out/json" --write "$out/predictions" || failed="$failed predictions"
fi
[[ -z $failed ]] || { echo "failed or cut short:$failed"; exit 1; }
