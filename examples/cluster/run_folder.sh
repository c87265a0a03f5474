# Source this file with the flags of the program. It sets run_dir to the value of --run-dir (or of --save, its name in Megatron-LM), or
# else to run_dir of the settings file, or else to runs/cluster. The array load continues the run in that folder. It is empty if the
# settings file names the weights with which a new run begins.
# shellcheck shell=bash
run_dir='' config=''
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --run[-_]dir | --save) next=$((i + 1)) && run_dir=${!next} ;;
    --run[-_]dir=* | --save=*) run_dir=${!i#*=} ;;
    --config) next=$((i + 1)) && config=${!next} ;;
    --config=*) config=${!i#*=} ;;
  esac
done
config=${config/#\~\//${HOME:-}/} # a shell leaves --config=~/FILE as it is, and the program finds the file
case $config in
  *'$'*)
    echo "error: --config = $config contains a variable, which only the shell can replace here" >&2
    echo "  remedy: write the path without single quotes" >&2
    exit 2
    ;;
esac
if [ -z "$run_dir" ] && [ -f "$config" ]; then
  run_dir=$(sed -nE "s/^(run[-_]dir|save): *[\"']?([^\"'#]*[^\"'# ]).*/\2/p" "$config" | head -n 1)
fi
run_dir=${run_dir:-runs/cluster}
load=(--load "$run_dir")
if [ -f "$config" ] && grep -q '^load:' "$config"; then
  # the program expands ~ and $VARIABLE in the same way
  expand='import os, sys; print(os.path.expandvars(os.path.expanduser(sys.argv[1])))'
  folder=$(python -c "$expand" "$run_dir" 2>/dev/null) || folder=$run_dir # with a container, the host may have no python
  if [ -z "$(find "$folder/checkpoints" -maxdepth 1 -name 'step_*' -print -quit 2>/dev/null)" ]; then
    # shellcheck disable=SC2034 # the script that sources this file uses it
    load=()
  fi
fi
