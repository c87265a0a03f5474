#!/usr/bin/env bash
# Makes .venv beside the README - or uses the virtual environment that is active -, installs the pinned requirements and builds
# the C++ extension. Run it as often as you like: it returns at once if nothing has changed, and repairs an interrupted installation.
# Prints the environment's folder on stdout, everything else on stderr:
#
#     source "$(bash tools/setup_env.sh)/bin/activate"
#
# PYTHON=python3.12 chooses the interpreter of a new .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
mark=.megatron_hyperrouter # in the environment: "making", or a hash of what is installed and the file name of the extension

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
  say "$1"
  exit 5
}

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python >= 3.10 found ($(${PYTHON:-python3} --version 2>/dev/null || echo "no ${PYTHON:-python3}")); install a newer Python, or give the path of a newer Python: PYTHON=/path/to/python bash tools/setup_env.sh"
}

find_compiler() {
  local candidate
  for candidate in ${CXX:-c++ g++ clang++}; do
    if command -v "$candidate" 2>/dev/null; then
      return
    fi
  done
}

make_venv() {
  local python
  python=$(find_python)
  say "creating .venv with $("$python" --version 2>&1) ($python)"
  rm -rf .venv
  mkdir .venv
  echo making >".venv/$mark"
  "$python" -m venv .venv >&2 || die "could not create .venv; on Debian or Ubuntu, install the package python3-venv, then run this script again"
}

choose_env() {
  if [[ -n ${VIRTUAL_ENV:-} && -x ${VIRTUAL_ENV:-}/bin/python ]]; then
    env=$VIRTUAL_ENV
  else
    env=$root/.venv
    local state=
    [[ -f .venv/$mark ]] && state=$(head -n 1 ".venv/$mark")
    # An unfinished .venv of ours, or one whose Python has gone, is made again; one made by hand is never removed.
    if [[ ! -e .venv || $state == making ]] || { [[ -n $state ]] && ! supported .venv/bin/python; }; then
      make_venv
    fi
  fi
  supported "$env/bin/python" || die "$env has no working Python >= 3.10; remove or deactivate this environment, then run this script again"
}

# What the environment must have been made from: interpreter, checkout, compiler, requirements, and all that the build reads.
fingerprint() {
  "$env/bin/python" - "$root" "$compiler" requirements.txt pyproject.toml setup.py megatron_hyperrouter/data/csrc/* <<'PYTHON'
import hashlib, pathlib, sys

digest = hashlib.sha256(repr((sys.version, *sys.argv[1:3])).encode())
for name in sys.argv[3:]:
    path = pathlib.Path(name)
    digest.update(repr((name, path.read_bytes() if path.is_file() else b"")).encode())
print(digest.hexdigest())
PYTHON
}

extension() {
  "$env/bin/python" -c 'import sysconfig; print("megatron_hyperrouter/data/_index" + sysconfig.get_config_var("EXT_SUFFIX"))'
}

up_to_date() {
  [[ -f $env/$mark ]] || return 1
  local lines
  mapfile -t lines <"$env/$mark"
  [[ ${lines[0]:-} == "$want" ]] && { [[ ${lines[1]:-none} == none ]] || [[ -f ${lines[1]} ]]; }
}

install() {
  local pip=("$env/bin/python" -m pip --disable-pip-version-check -qq --no-input) built
  if ! "${pip[@]}" --version >/dev/null 2>&1; then # for example in an environment that uv created
    say "adding pip to $env"
    "$env/bin/python" -m ensurepip >/dev/null 2>&1 || die "$env has no pip, and pip could not be added; on Debian or Ubuntu, install the package python3-venv, then run this script again"
  fi
  say "installing the requirements into $env (takes a few minutes the first time)"
  "${pip[@]}" install -r requirements.txt >&2 || die "pip could not install requirements.txt (its output is above); check the network and the free disk space, then run this script again"
  [[ -n $compiler ]] || say "no C++ compiler found, so the C++ extension is not built; NumPy computes the data indices instead (same results, but slower)"
  built=$(extension)
  rm -f "$built" # an extension made from other sources must not outlive a build that fails
  "${pip[@]}" install --no-build-isolation --no-deps -e . >&2 || die "pip could not install megatron_hyperrouter itself (its output is above)"
  if [[ ! -f $built ]]; then
    [[ -z $compiler ]] || say "the C++ extension could not be built (to see why, run: $env/bin/python -m pip install -v --no-build-isolation --no-deps -e .); NumPy computes the data indices instead (same results, but slower)"
    built=none
  fi
  printf '%s\n%s\n' "$want" "$built" >"$env/$mark"
}

# Two set-ups of one checkout at the same time would disturb each other.
if command -v flock >/dev/null; then
  exec 9<"$root"
  flock 9
fi
env=
choose_env
compiler=$(find_compiler)
want=$(fingerprint)
if ! up_to_date; then
  install
  say "ready; activate it with: source $env/bin/activate"
fi
printf '%s\n' "$env"
