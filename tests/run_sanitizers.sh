#!/usr/bin/env bash
# Builds the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer, outside the tree,
# and runs the op tests over it. PYTHON chooses the interpreter (the one with torch).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

NEQ_BUILD_CUDA=0 NEQ_BUILD_SANITIZE=1 "$python" setup.py -q build_ext \
  --build-lib "$scratch/lib" --build-temp "$scratch/temp" >"$scratch/build.log" 2>&1 ||
  { cat "$scratch/build.log" >&2; exit 1; }

tests=(tests/backends/test_cpu*.py tests/test_ops.py tests/backends/test_channel_similarity.py tests/test_ops_precision.py)

# Python itself is not instrumented: the sanitizer's runtime has to be there first, and what Python
# never frees is no leak of ours.
export LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export NEQ_KERNELS_LIBRARY="$scratch/lib/neq_kernels/_C.so"
export OMP_NUM_THREADS=1

"$python" -c "
from neq_kernels.dispatch.selection import selector
reason = selector.backends['cpu'].unavailable()
assert reason is None, reason
"
# The other backends run none of the instrumented code. Captured by sys alone, so that a sanitizer's
# report is seen when it ends the process.
"$python" -m pytest -q -p no:cacheprovider --capture=sys -k "not portable and not below_the_best and not reference and not aten" \
  "${tests[@]}" "$@"
