#!/usr/bin/env bash
# The ranks of one node: bash launch/submit/node.sh RECIPE.yaml [key=value ...]
# Reads NODES, NODE_RANK, RANKS_PER_NODE, MASTER_ADDR, MASTER_PORT; LAUNCHER is composer (default) or torchrun.
# SIGTERM goes on to the ranks alone: the launchers would not pass it on, or kill what saves. Status 75: told to
# end, start the same command again.
set -u
cd "$(dirname "$0")/../.." || exit 2
export PATH=$PWD/.venv/bin:$PATH
# The launcher sets its own; a scheduler's would be taken for them.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

case ${LAUNCHER:-composer} in
composer) launcher=(composer --nproc "$RANKS_PER_NODE" --world_size $((NODES * RANKS_PER_NODE))
    --base_rank $((NODE_RANK * RANKS_PER_NODE)) --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT") ;;
torchrun) launcher=(torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT") ;;
*) echo "node.sh: LAUNCHER=$LAUNCHER is not known; use composer or torchrun" >&2 && exit 2 ;;
esac

"${launcher[@]}" train/main.py "$@" &
running=$!
[ -n "${PID_FILE:-}" ] && echo $$ >"$PID_FILE"
is_told_to_end=
trap 'is_told_to_end=1; pkill -TERM -P "$running"' TERM
wait "$running"
# A trapped signal ends `wait`, not the process.
while kill -0 "$running" 2>/dev/null; do wait "$running"; done
wait "$running"
status=$?
[ -n "$is_told_to_end" ] && [ "$status" -ne 0 ] && status=75
exit "$status"
