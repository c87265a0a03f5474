#!/usr/bin/env bash
# The C++ extension and the fuzzers of token files under the address and undefined-behaviour sanitizers, in a copy of the sources.
# Needs the virtual environment's python first in the path, and g++ with its sanitizers. As it stands it takes a minute or two;
# MHR_FUZZ=100000 for as many mutations of each kind, and --hypothesis-profile deep for many examples.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r megatron_hyperrouter tests pyproject.toml "$copy"
rm -f "$copy"/megatron_hyperrouter/data/_index*.so

read -r -a includes <<<"$(python -m pybind11 --includes)"
suffix=$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
flags=(-std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off "-fsanitize=address,undefined" -fno-sanitize-recover=all)
g++ "${flags[@]}" -shared -fPIC "${includes[@]}" megatron_hyperrouter/data/csrc/bindings.cpp -o "$copy/megatron_hyperrouter/data/_index$suffix"

# Python itself is not instrumented, so the runtimes come first; what it keeps until the end is no leak.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
files=(tests/data/test_data_{index,index_limits,index_permutation,store_fuzz,on_demand,order,gather,blend}.py)
cd "$copy"
# With pytest's usual capture the report of an error would be lost, for it ends the process.
env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
  MHR_FUZZ="${MHR_FUZZ:-2000}" PYTHONPATH="$copy:$copy/tests" \
  python -m pytest -q -p no:cacheprovider --capture=sys "${files[@]}" -k "not NumPy" "$@"
