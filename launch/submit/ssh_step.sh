#!/usr/bin/env bash
# Runs one try of a job on hosts over a remote shell: bash launch/submit/ssh_step.sh HOST,HOST,... RECIPE.yaml [key=value ...]
# Reads RANKS_PER_NODE, MASTER_PORT, LAUNCHER, WORKDIR, SAVE_SECONDS; VARIABLES, the ranks' environment as shell
# words; REMOTE_SHELL, a command that takes a host and a shell line to run on it; and FINEGRAIN_RECORDS, set by the
# supervisor. A remote shell does not pass variables on, so the line contains all that ranks need.
# The first host that fails ends the others; SIGTERM goes to all. With -m each remote shell has its own process group:
# the supervisor signals only this script's, since a remote shell killed by SIGTERM could not report the save.
set -um
IFS=, read -ra hosts <<<"$1"
shift
for host in "${hosts[@]}"; do
    case $host in
    -*) echo "ssh_step.sh: $host is no host: the remote shell would take it for an option" >&2 && exit 2 ;;
    esac
done
read -ra shell <<<"$REMOTE_SHELL"
# One per host: jobs on other hosts may share the checkout.
pid_file() { printf %q "$WORKDIR/.cache/job-$MASTER_PORT-$1.pid"; }
is_ending=
terminate_all() {
    is_ending=1
    for pid in "${running[@]}"; do
        host=${host_of[$pid]}
        "${shell[@]}" "$host" "kill -TERM \$(cat $(pid_file "$host"))" </dev/null 2>/dev/null &
    done
}
words=$(printf ' %q' "$@")
running=()
declare -A host_of
for rank in "${!hosts[@]}"; do
    host=${hosts[$rank]}
    "${shell[@]}" "$host" "cd $(printf %q "$WORKDIR") && mkdir -p .cache && env $VARIABLES \
        NODES=${#hosts[@]} NODE_RANK=$rank RANKS_PER_NODE=$RANKS_PER_NODE MASTER_ADDR=$(printf %q "${hosts[0]}") \
        MASTER_PORT=$MASTER_PORT LAUNCHER=$LAUNCHER SAVE_SECONDS=$SAVE_SECONDS PID_FILE=$(pid_file "$host") \
        FINEGRAIN_HOST=$(printf %q "$host") FINEGRAIN_RECORDS=$(printf %q "${FINEGRAIN_RECORDS:-}") \
        bash launch/submit/node.sh$words" </dev/null &
    running+=($!)
    host_of[$!]=$host
done
trap terminate_all TERM
status=0 waker=
while [ ${#running[@]} -gt 0 ]; do
    # SIGTERM is repeated: a host's process may not have been ready for it.
    if [ -n "$is_ending" ] && [ -z "$waker" ]; then
        sleep 5 &
        waker=$!
    fi
    ended=
    wait -n -p ended "${running[@]}" ${waker:+"$waker"}
    this=$?
    [ -n "${ended:-}" ] || continue # a trapped signal ended the wait
    if [ "$ended" = "$waker" ]; then
        waker=
        terminate_all
        continue
    fi
    left=()
    for pid in "${running[@]}"; do [ "$pid" = "$ended" ] || left+=("$pid"); done
    running=("${left[@]}")
    if [ "$this" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$this
        echo "ssh_step.sh: ${host_of[$ended]} ended with $this: stopping the others" >&2
        # 255 is a failure of the remote shell itself: record the host for the supervisor.
        if [ "$this" -eq 255 ] && [ -n "${FINEGRAIN_RECORDS:-}" ]; then
            echo "${host_of[$ended]}" >"$FINEGRAIN_RECORDS/lost-host"
        fi
        terminate_all
    fi
done
[ -n "$waker" ] && kill "$waker" 2>/dev/null
exit "$status"
