#!/usr/bin/env bash
# Starts the ranks of one node: bash launch/submit/node.sh RECIPE.yaml [key=value ...]
# Reads NODES, NODE_RANK, RANKS_PER_NODE, MASTER_ADDR, MASTER_PORT; LAUNCHER is composer (default) or torchrun;
# LOOK_BACK and FINEGRAIN_RECORDS if no supervisor keeps the job running (launch/restart/look_back.py).
# SIGTERM is passed to the ranks only: the launchers would not pass it on, or would kill ranks that are saving.
# Ranks that have not ended SAVE_SECONDS (default 300) later, for example a stopped one, are killed. Status 75:
# stopped by SIGTERM; start the same command again.
# SETUP is a file to read first, for modules and variables of the site.
cd "$(dirname "$0")/../.." || exit 2
# shellcheck disable=SC1090  # the user's
if [ -n "${SETUP:-}" ]; then . "$SETUP" || exit 2; fi
set -u
export PATH=$PWD/.venv/bin:$PATH
# The launcher sets its own; it would mistake a scheduler's for them.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

case ${LAUNCHER:-composer} in
composer) launcher=(composer --nproc "$RANKS_PER_NODE" --world_size $((NODES * RANKS_PER_NODE))
    --base_rank $((NODE_RANK * RANKS_PER_NODE)) --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT") ;;
torchrun) launcher=(torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT") ;;
*) echo "node.sh: LAUNCHER=$LAUNCHER is not known; use composer or torchrun" >&2 && exit 2 ;;
esac

# Systems that restart jobs by themselves keep no log of tries: the first node does, and may stop the job (70).
if [ "${LOOK_BACK:-}" = yes ] && [ "$NODE_RANK" = 0 ]; then
    python -m launch.restart --look-back --records "$FINEGRAIN_RECORDS" || exit
fi

kill_launcher() { # and its ranks
    pkill -KILL -P "$1"
    kill -KILL "$1" 2>/dev/null
}
# A try whose connection was lost may still run here and hold the port and the GPUs.
if [ -n "${PID_FILE:-}" ] && before=$(cat "$PID_FILE" 2>/dev/null) && grep -qs node.sh "/proc/$before/cmdline"; then
    echo "node.sh: an earlier try still runs here: killing it" >&2
    for pid in $(pgrep -P "$before"); do kill_launcher "$pid"; done
    kill -KILL "$before" 2>/dev/null
fi

"${launcher[@]}" train/main.py "$@" &
running=$!
deadline=
# Only once: a second SIGTERM would kill ranks that have saved.
# shellcheck disable=SC2317  # called by the trap
terminate() {
    [ -n "$deadline" ] && return
    deadline=$((SECONDS + ${SAVE_SECONDS:-300}))
    pkill -TERM -P "$running"
}
trap terminate TERM
if [ -n "${PID_FILE:-}" ]; then # from here on it can be stopped
    echo $$ >"$PID_FILE"
    trap 'rm -f "$PID_FILE"' EXIT
fi
wait "$running"
# A trapped signal ends `wait` but not the process.
while kill -0 "$running" 2>/dev/null; do
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
        echo "node.sh: not ended ${SAVE_SECONDS:-300} s after SIGTERM: killed" >&2
        kill_launcher "$running"
        deadline= # the save is incomplete
    fi
    sleep 0.5
done
wait "$running"
status=$?
[ -n "$deadline" ] && [ "$status" -ne 0 ] && status=75
exit "$status"
