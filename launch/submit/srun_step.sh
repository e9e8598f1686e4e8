#!/usr/bin/env bash
# Runs one try of a job on SLURM: bash launch/submit/srun_step.sh HOST,HOST,... RECIPE.yaml [key=value ...]
# Reads RANKS_PER_NODE and, for containers, CONTAINER_ARGUMENTS. srun starts the ranks itself, one task each.
# Each rank gets its share of the node's CPUs, next to one another: one socket's for the first half of the ranks.
# In a container the image's Python runs, even if the checkout that is mounted there has a .venv.
# SIGTERM is passed to the ranks, which save and end with 75; srun by itself would kill them.
set -um
hosts=$1
shift
# The supervisor excludes bad hosts while there are spare ones: a chosen host that is down means none is left.
if sinfo --noheader --Node --nodes="$hosts" --states=down | grep -q .; then
    echo "srun_step.sh: a node of $hosts is down and no spare one is left: requeued" >&2
    scontrol requeue "$SLURM_JOB_ID" && sleep 600
fi
commas=${hosts//[^,]/}
nodes=$((${#commas} + 1))
first=$(scontrol show node "${hosts%%,*}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
cpus=$((${SLURM_CPUS_ON_NODE:-0} / RANKS_PER_NODE))
binding=()
[ "$cpus" -gt 0 ] && binding=(--cpus-per-task="$cpus" --cpu-bind=cores)
checkout=
[ -z "${CONTAINER_ARGUMENTS:-}" ] && [ -d .venv ] && checkout=$PWD/.venv/bin:
export MASTER_ADDR=$first RANKS_PER_NODE CHECKOUT_PATH=$checkout

# --ntasks, since the allocation's own number counts the spare nodes.
# shellcheck disable=SC2016,SC2086  # expanded by each task; the container's arguments are several words
srun --nodelist="$hosts" --nodes="$nodes" --ntasks=$((nodes * RANKS_PER_NODE)) \
    --ntasks-per-node="$RANKS_PER_NODE" --distribution=block:block "${binding[@]}" \
    --kill-on-bad-exit=1 --unbuffered ${CONTAINER_ARGUMENTS:-} \
    bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        export LOCAL_WORLD_SIZE=$RANKS_PER_NODE NODE_RANK=$SLURM_NODEID
        PATH=$CHECKOUT_PATH$PATH
        exec python train/main.py "$@"' rank "$@" &
step=$!
is_told_to_end=
trap 'is_told_to_end=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"
# A trapped signal ends `wait` but not the process.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
status=$?
# srun may kill ranks that exit after the first one with 75; the checkpoint is complete before any exits.
[ -n "$is_told_to_end" ] && [ "$status" -ne 0 ] && status=75
exit "$status"
