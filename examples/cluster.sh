#!/usr/bin/env bash
# Start a run on several nodes with the deepspeed launcher, which reaches the nodes by ssh:
#
#   bash examples/cluster.sh HOSTFILE [flags of pretrain_gpt_hyperrouter.py] [-- flags of deepspeed, such as --exclude node7]
#
# HOSTFILE contains one line for each node, such as "node1 slots=8" for a node with 8 GPUs. Every node must have the project folder under
# the same path, and in it the environment that tools/setup_env.sh makes. After a failure, run the same command again: it continues from the last complete
# checkpoint in its run folder (runs/cluster, if the flags name no other). If Ctrl-C or a signal stops the run, it saves and ends with
# exit status 6; the same command continues it.
set -euo pipefail

fail() { # message, remedy
  printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 2
}

[ $# -gt 0 ] || fail "no HOSTFILE given" "run: bash examples/cluster.sh HOSTFILE [flags]"
[ -f "$1" ] || fail "HOSTFILE $1 $([ -e "$1" ] && echo "is not a file" || echo "does not exist")" "create a file with a line for each machine, such as: node1 slots=8"
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

# Check HOSTFILE here: for a wrong line, the launcher prints a traceback, and for a machine that it cannot reach, it prints nothing
# for a long time.
hosts=()
declare -A slots
number=0
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1))
  line=${line%%#*}
  line=${line%"${line##*[![:space:]]}"}
  line=${line#"${line%%[![:space:]]*}"}
  [ -n "$line" ] || continue
  [[ $line =~ ^([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)([[:space:]].*)?$ ]] \
    || fail "$hostfile, line $number: '$line' must be the name of a machine and its number of GPUs" "write it as: node1 slots=8"
  host=${BASH_REMATCH[1]}
  [[ " ${hosts[*]} " != *" $host "* ]] || fail "$hostfile, line $number: $host is listed twice" "keep one line for each machine"
  hosts+=("$host")
  slots[$host]=${BASH_REMATCH[2]}
done <"$hostfile"
[ ${#hosts[@]} -gt 0 ] || fail "$hostfile lists no machine" "add a line for each machine, such as: node1 slots=8"

# find the machines that remain after the launcher's flags --include and --exclude
chosen=("${hosts[@]}")
choice='' amount=''
for ((i = 0; i < ${#launcher[@]}; i++)); do
  case ${launcher[i]} in
    --num_nodes* | --num_gpus*) amount=${launcher[i]%%=*} && continue ;;
    --include=* | --exclude=*) flag=${launcher[i]%%=*} list=${launcher[i]#*=} ;;
    --include | --exclude | -i | -e) flag=${launcher[i]} list=${launcher[i + 1]:-} ;;
    *) continue ;;
  esac
  [ -z "$choice" ] || fail "$choice and $flag are both given" "keep one of the two"
  choice="$flag $list"
  names=" ${list//@/ } "
  for name in $names; do
    host=${name%%:*} asked=${name#*:}
    [[ " ${hosts[*]} " == *" $host "* ]] || fail "$choice: $host is not in $hostfile" "use the machines of that file: ${hosts[*]}"
    [ "$name" != "$host" ] || continue
    [[ $name =~ ^[^:]+:[0-9]+(,[0-9]+)*$ ]] || fail "$choice: '$name' must be a machine and its slots" "write it as: $host:0,1"
    last=$((${slots[$host]} - 1))
    for slot in ${asked//,/ }; do
      [ "$((10#$slot))" -le "$last" ] \
        || fail "$choice: $host has no slot $slot" "use its slots from 0 to $last, as listed in $hostfile"
    done
  done
  kept=()
  for host in "${chosen[@]}"; do
    case $flag in
      --include | -i) [[ $names != *" $host "* && $names != *" $host:"* ]] || kept+=("$host") ;;
      *) [[ $names == *" $host "* ]] || kept+=("$host") ;;
    esac
  done
  [ ${#kept[@]} -gt 0 ] || fail "$choice leaves no machine of $hostfile" "exclude fewer machines"
  chosen=("${kept[@]}")
done
[ -z "$choice" ] || [ -z "$amount" ] || fail "$choice and $amount are both given" "keep one of the two"

# The launcher reaches all machines with pdsh and ssh. With --launcher, or if there is only one machine, it only connects to the
# first machine, to find its address.
asked=" ${launcher[*]:-} "
reached=("${chosen[@]}")
if [[ $asked == *" --launcher"* ]]; then
  reached=("${chosen[0]}")
elif [ ${#chosen[@]} -gt 1 ] && [[ $asked != *" --no_ssh "* ]]; then
  command -v pdsh >/dev/null \
    || fail "pdsh is not installed, but the deepspeed launcher needs it to reach the other machines" "install pdsh, or use another launcher: -- --launcher openmpi"
fi
if [[ $asked != *" --no_ssh "* && ($asked != *" --no_ssh_check "* || ${#reached[@]} -gt 1) ]]; then
  # the options that pdsh passes on to ssh
  read -ra options <<<"${PDSH_SSH_ARGS_APPEND:-}"
  lost=$(for host in "${reached[@]}"; do
    (ssh -o BatchMode=yes -o ConnectTimeout=10 "${options[@]}" "$host" true </dev/null >/dev/null 2>&1 || echo "$host") &
  done; wait)
  if [ -n "$lost" ]; then
    first=${lost%%$'\n'*} remedy="exclude the machine with -- --exclude ${lost%%$'\n'*}"
    [ ${#hosts[@]} -gt 1 ] || remedy="start on this machine without a HOSTFILE: deepspeed pretrain_gpt_hyperrouter.py --config FILE"
    fail "ssh cannot reach ${lost//$'\n'/, } without a password" "find the reason with: ssh $first true; or $remedy"
  fi
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  # shellcheck source=/dev/null
  source "$(bash tools/setup_env.sh)/bin/activate"
fi

# The launcher passes only the environment variables in the file $DS_ENV_FILE to the workers. Here, this file contains the variables of
# ~/.deepspeed_env, and two more.
# OMP_NUM_THREADS limits the threads of each rank. TORCH_NCCL_ASYNC_ERROR_HANDLING lets NCCL fail instead of hang if a rank is lost.
mkdir -p runs/cluster
{
  cat ~/.deepspeed_env 2>/dev/null || true
  echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}"
  echo "TORCH_NCCL_ASYNC_ERROR_HANDLING=1"
} >runs/cluster/workers.env
export DS_ENV_FILE=$PWD/runs/cluster/workers.env

program=(--config examples/cluster.yaml "${program[@]}")
# shellcheck source=examples/cluster/run_folder.sh
source examples/cluster/run_folder.sh "${program[@]}"
exec deepspeed --hostfile "$hostfile" "${launcher[@]}" pretrain_gpt_hyperrouter.py \
  --run-dir "$run_dir" "${load[@]}" "${program[@]}"
