#!/usr/bin/env bash
# Builds the package and runs the tests that need no engine on every supported Python of this machine.
# By hand, not in CI: each Python gets a fresh environment (minutes each). Arguments go to pytest.
#
#   bash tests/pythons.sh              # Python 3.10 to 3.13, those that are installed
#   PYTHONS="3.12 some/where/bin/python3.13" bash tests/pythons.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
libraries=(annotated-types filelock "numpy>=1.26" pydantic PyYAML rich safetensors tokenizers torch)
tools=(pybind11 setuptools wheel pytest hypothesis scipy)
# the tests of these rooms that import no host
mapfile -t tests < <(grep -LE '^ *(from|import) (megatron\.|deepspeed|megatron_hyperrouter\.(engines|model|evaluate|train))' tests/{analysis,config,ops,routers}/test_*.py)
status=0
for version in ${PYTHONS:-3.10 3.11 3.12 3.13}; do
  python=$(command -v "$version" || command -v "python$version" || true)
  if [[ -z $python ]] || ! "$python" -c 'import ssl' 2>/dev/null; then
    printf '%s: not installed\n' "$version"
    continue
  fi
  env=$work/$(basename "$version")
  "$python" -m venv "$env"
  "$env/bin/pip" install -q --disable-pip-version-check "${libraries[@]}" "${tools[@]}"
  "$env/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
  "$env/bin/mhr" --help >/dev/null
  if "$env/bin/python" -m pytest -q -p no:cacheprovider "${tests[@]}" "$@"; then
    printf '%s: passed\n' "$version"
  else
    printf '%s: FAILED\n' "$version"
    status=1
  fi
done
exit "$status"
