#!/usr/bin/env bash
# Start a run on several nodes with the deepspeed launcher, which reaches them by ssh:
#
#   bash examples/cluster.sh HOSTFILE [flags of pretrain_gpt_hyperrouter.py] [-- flags of deepspeed, such as --exclude node7]
#
# HOSTFILE has a line "name slots=8" for each node. Every node must have this folder under the same path, and its environment
# (tools/setup_env.sh). The command continues from the last complete checkpoint of runs/cluster, so start it again after a failure.
# Exit status 6: Ctrl-C or a signal stopped the run, which has saved; run the same command again to continue.
set -euo pipefail

fail() { # message, remedy
  printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 2
}

[ $# -gt 0 ] || fail "no HOSTFILE given" "bash examples/cluster.sh HOSTFILE [flags]"
[ -f "$1" ] || fail "HOSTFILE $1 does not exist" "write a line such as: node1 slots=8"
hostfile=$(realpath "$1")
shift
program=() launcher=()
while [ $# -gt 0 ]; do
  if [ "$1" = -- ]; then
    shift
    launcher=("$@")
    break
  fi
  program+=("$1")
  shift
done

# The launcher answers a wrong line with a traceback, and a machine that it does not reach with nothing for a long time.
hosts=()
number=0
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1))
  line=${line%%#*}
  line=${line%"${line##*[![:space:]]}"}
  [ -n "$line" ] || continue
  [[ $line =~ ^([^[:space:]]+)[[:space:]]+slots=[1-9][0-9]*([[:space:]].*)?$ ]] \
    || fail "$hostfile, line $number: '$line' must be a name and its GPUs" "write it as: node1 slots=8"
  host=${BASH_REMATCH[1]}
  [[ " ${hosts[*]} " != *" $host "* ]] || fail "$hostfile, line $number: $host stands there twice" "give it one line"
  hosts+=("$host")
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no machine" "write a line such as: node1 slots=8"

asked=" ${launcher[*]:-} "
if [ ${#hosts[@]} -gt 1 ] && [[ $asked != *" --launcher"* && $asked != *" --no_ssh "* ]]; then
  command -v pdsh >/dev/null \
    || fail "pdsh is not installed, which the deepspeed launcher starts machines with" "install pdsh, or give another launcher: -- --launcher openmpi"
  # the options that pdsh hands to ssh, and a port for the launcher
  read -ra options <<<"${PDSH_SSH_ARGS_APPEND:-}"
  lost=$(for host in "${hosts[@]}"; do
    # what the launcher leaves out need not answer
    [[ $asked != *--exclude* || ${asked//[=@]/ } != *" $host "* ]] || continue
    [[ $asked != *--include* || ${asked//[=@:]/ } == *" $host "* ]] || continue
    (ssh -o BatchMode=yes -o ConnectTimeout=10 "${options[@]}" "$host" true </dev/null >/dev/null 2>&1 || echo "$host") &
  done; wait)
  [ -z "$lost" ] || fail "ssh does not reach ${lost//$'\n'/, } without a password" "try: ssh ${lost%%$'\n'*} true; or take the machine out with -- --exclude ${lost%%$'\n'*}"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  # shellcheck source=/dev/null
  source "$(bash tools/setup_env.sh)/bin/activate"
fi

# The launcher hands the variables of this file to the workers, and no others: yours from ~/.deepspeed_env, and two of ours.
# Each rank keeps to its cores; NCCL fails rather than hangs when a peer is lost.
mkdir -p runs/cluster
{
  cat ~/.deepspeed_env 2>/dev/null || true
  echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}"
  echo "TORCH_NCCL_ASYNC_ERROR_HANDLING=1"
} >runs/cluster/workers.env
export DS_ENV_FILE=$PWD/runs/cluster/workers.env

exec deepspeed --hostfile "$hostfile" "${launcher[@]}" pretrain_gpt_hyperrouter.py \
  --config examples/cluster.yaml --load runs/cluster "${program[@]}"
