#!/usr/bin/env bash
# Runs the layout tables of both engines and the other tests of the hosts with the newest DeepSpeed and megatron-core, in an
# environment of its own, on Python >= 3.12 (older ones have no megatron-core after 0.16.1). The other libraries are the pinned ones.
# By hand, not in CI: it downloads a few GB and computes for about an hour. Arguments go to pytest, in place of those tests.
#
#   bash tests/newest_hosts.sh
#   PYTHON=some/where/bin/python3.13 KEEP=some/folder bash tests/newest_hosts.sh tests/compat   # keeps the environment there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.13 "$(uv python find '>=3.12' 2>/dev/null)"}; do
    if "$candidate" -c 'import ssl, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "needs Python >= 3.12; name one: PYTHON=/path/to/python3.12 bash tests/newest_hosts.sh" >&2
  exit 5
}

python=$(find_python)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
env=${KEEP:-$work/env}
[[ -x $env/bin/python ]] || "$python" -m venv "$env"
pip=("$env/bin/pip" install -q --disable-pip-version-check)
# what the tests below import; triton, which newer hosts import on a CPU too, comes with torch's GPU builds alone
needed='torch|annotated-types|numpy|pyarrow|pydantic|PyYAML|rich|safetensors|tokenizers|pybind11|setuptools|wheel|hypothesis|psutil|pytest|scipy|transformers'
grep -E "^($needed)==" requirements.txt >"$work/pins.txt"
"${pip[@]}" -r "$work/pins.txt"
"${pip[@]}" --upgrade megatron-core deepspeed
"$env/bin/python" -c 'import triton' 2>/dev/null || "${pip[@]}" triton
"${pip[@]}" --no-deps --no-build-isolation -e .
"$env/bin/pip" list 2>/dev/null | grep -Ei '^(torch|triton|megatron-core|deepspeed) '

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
tests=("$@")
[[ $# -gt 0 ]] || tests=(tests/compat tests/model tests/engines)
"$env/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}"
