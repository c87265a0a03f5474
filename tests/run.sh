#!/usr/bin/env bash
# Set-up, then linters and types, then the tests. Arguments go to pytest: bash tests/run.sh -k topk
# Everything runs even where an earlier check failed; the exit status is 0 only where all of them passed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
env=$(bash tools/setup_env.sh)
# shellcheck source=/dev/null
source "$env/bin/activate"
export OMP_NUM_THREADS=1

failed=()
check() {
  printf '\n== %s\n' "$1"
  "${@:2}" || failed+=("$1")
}

mapfile -t shell < <(find . \( -name .venv -o -name .git -o -name runs -o -name build \) -prune -o \( -name '*.sh' -o -path './.ci/run' \) -print)
mapfile -t cpp < <(find megatron_hyperrouter -name '*.cpp' -o -name '*.h')

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "shellcheck" shellcheck "${shell[@]}"
check "clang-format" clang-format --dry-run -Werror "${cpp[@]}"
# A file stays on one worker, so that what its tests share is trained once (pytest-xdist 3.8 does not see groups under pytest 9.2).
check "pytest" python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"

if ((${#failed[@]})); then
  printf '\nFAILED: %s\n' "$(IFS=, && echo "${failed[*]}")"
  exit 1
fi
printf '\nall checks passed\n'
