#!/usr/bin/env bash
# A Ray cluster on this machine, on loopback alone: a head that only manages, and WORKERS nodes beside it.
#
#   cluster/local.sh                    until Ctrl-C; prints what other shells need
#   cluster/local.sh COMMAND ...        starts it, runs the command, ends it, exits with the command's status
#
# WORKERS (2), CPUS and GPUS of each (2 and 0), RAY_PORT (6379) and DASHBOARD_PORT (8265) are taken from the environment.
# At its end it stops the processes that it started and no others. Nodes have addresses of loopback; that Ray's own ports
# listen on all interfaces nevertheless is Ray's doing, and the token is what they ask for.
set -euo pipefail

WORKERS=${WORKERS:-2} CPUS=${CPUS:-2} GPUS=${GPUS:-0} RAY_PORT=${RAY_PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265}

# Short: the paths of Ray's sockets may have 107 characters. Private: it holds the token.
folder=$(mktemp -d "${TMPDIR:-/tmp}/ray-XXXXXX")
pids=()
finish() {
    trap - EXIT
    trap '' INT TERM
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do # the head last
        kill "${pids[i]}" 2>/dev/null || true
        wait "${pids[i]}" 2>/dev/null || true
    done
    for ((i = 0; i < 20; i++)); do # what workers of a node log last may come while it is being removed
        rm -rf "$folder" 2>/dev/null && return
        sleep 0.5
    done
    echo "local.sh: $folder is still written to; remove it" >&2
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

umask 077
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/token"
cat >"$folder/env" <<END
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_ADDRESS=127.0.0.2:$RAY_PORT
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT
END
# shellcheck source=/dev/null
source "$folder/env"
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}

# Each in a session of its own, so that a Ctrl-C is seen by this script alone, which ends them in order. A node's agent,
# which takes jobs, listens on 127.0.0.1 beside its node's address, so on a fixed port the first of several would be the
# only one, and none where another Ray has it: Ray then says "No available agent to submit job".
start() {
    local log=$1
    shift
    setsid ray start --block --disable-usage-stats --min-worker-port=0 --max-worker-port=0 \
        --dashboard-agent-listen-port=0 "$@" >"$folder/$log" 2>&1 &
    pids+=($!)
}

# Waits for what `ray start` says once a node is up; ends with the log if it says something else.
wait_for() {
    local log=$1 pid=$2
    until grep -q 'Ray runtime started' "$folder/$log" 2>/dev/null; do
        if ! kill -0 "$pid" 2>/dev/null; then
            cat "$folder/$log" >&2
            exit 1
        fi
        sleep 0.2
    done
}

# All of 127.0.0.0/8 is loopback: nodes with addresses of their own need not share ports. Ray takes 127.0.0.1 for the
# machine's outer address, so the first is 127.0.0.2.
start head.log --head --num-cpus=0 --num-gpus=0 --node-ip-address=127.0.0.2 --port="$RAY_PORT" --temp-dir="$folder" \
    --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT"
wait_for head.log "${pids[0]}"
for ((i = 1; i <= WORKERS; i++)); do
    # One after the other: Ray gives a node 30 seconds to come up, which is short where many do so at once.
    start "worker-$i.log" --address="127.0.0.2:$RAY_PORT" --node-ip-address="127.0.0.$((i + 2))" \
        --num-cpus="$CPUS" --num-gpus="$GPUS"
    wait_for "worker-$i.log" "${pids[i]}"
done

if (($#)); then
    "$@"
else
    echo "$WORKERS nodes are up; dashboard: http://127.0.0.1:$DASHBOARD_PORT. In other shells first:"
    echo "    source $folder/env"
    echo "Ctrl-C ends it."
    wait -n "${pids[@]}" # returns if one of them ends by itself
    echo "a node has ended by itself; the logs are in $folder/session_latest/logs until this shell goes on" >&2
    exit 1
fi
