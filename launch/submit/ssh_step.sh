#!/usr/bin/env bash
# One try of a job on hosts that a remote shell reaches: bash launch/submit/ssh_step.sh HOST,HOST,... RECIPE.yaml [key=value ...]
# Reads RANKS_PER_NODE, MASTER_PORT, LAUNCHER, WORKDIR, VARIABLES, the ranks' environment in shell's words, and
# REMOTE_SHELL, the words of a command that gets a host and a line for a shell on it.
# The first host that fails ends the others; SIGTERM goes to all.
set -u
IFS=, read -ra hosts <<<"$1"
shift
read -ra shell <<<"$REMOTE_SHELL"
pid_file=$(printf %q "$WORKDIR")/.cache/job-$MASTER_PORT
terminate_all() {
    for rank in "${!hosts[@]}"; do
        "${shell[@]}" "${hosts[$rank]}" "kill -TERM \$(cat $pid_file-$rank.pid)" 2>/dev/null &
    done
}
words=$(printf ' %q' "$@")
running=()
for rank in "${!hosts[@]}"; do
    "${shell[@]}" "${hosts[$rank]}" "cd $(printf %q "$WORKDIR") && mkdir -p .cache && env $VARIABLES \
        NODES=${#hosts[@]} NODE_RANK=$rank RANKS_PER_NODE=$RANKS_PER_NODE MASTER_ADDR=${hosts[0]} \
        MASTER_PORT=$MASTER_PORT LAUNCHER=$LAUNCHER PID_FILE=$pid_file-$rank.pid bash launch/submit/node.sh$words" &
    running+=($!)
done
trap terminate_all TERM
status=0
while [ ${#running[@]} -gt 0 ]; do
    ended=
    wait -n -p ended "${running[@]}"
    this=$?
    [ -n "${ended:-}" ] || continue # a trapped signal ended the wait
    left=()
    for pid in "${running[@]}"; do [ "$pid" = "$ended" ] || left+=("$pid"); done
    running=("${left[@]}")
    if [ "$this" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$this
        terminate_all
    fi
done
exit "$status"
