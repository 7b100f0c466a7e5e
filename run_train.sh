#!/usr/bin/env bash
# Train from a TOML file: ./run_train.sh --job.config_file train_configs/debug_model.toml [--section.key value ...]
#
#   NGPU           processes on this machine            (default: one per visible GPU, else 1 process on the CPU)
#   CONFIG_FILE    the same as --job.config_file        (the argument wins)
#   LOG_RANK       local ranks whose output is shown    (default: 0)
#   NNODES, NODE_RANK, RDZV_ENDPOINT (host:port)        for several machines; start this script on each of them
#   NGPU=64 ... --comm.mode fake_backend                starts one process, which checks a job of NGPU x NNODES processes
#   MAX_RESTARTS   how many times all processes are restarted from the newest checkpoint after a process was lost (default: 0)
#   PYTHON         the interpreter                      (default: python)
#   OMP_WAIT_POLICY, GOMP_SPINCOUNT, KMP_BLOCKTIME       how threads wait on a CPU (default: they sleep, OMP_WAIT_POLICY=PASSIVE)
set -euo pipefail

if [[ -n ${CONFIG_FILE:-} ]]; then set -- --job.config_file "${CONFIG_FILE}" "$@"; fi
if (($# == 0)); then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
    echo "  ./run_train.sh --help lists all keys" >&2
    exit 2
fi

fail() {
    echo "error: $1" >&2
    exit 2
}

# whole_number NAME VALUE LEAST
whole_number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || (($2 < $3)); then
        fail "$1 = $2: must be a whole number, at least $3"
    fi
}

PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
LOG_RANK=${LOG_RANK:-0}
MAX_RESTARTS=${MAX_RESTARTS:-0}
if [[ -z ${NGPU:-} ]]; then
    NGPU=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        NGPU=$(tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES}" | grep -c . || true)
    fi
    if ((NGPU == 0)); then NGPU=1; fi
fi
whole_number NGPU "${NGPU}" 1
whole_number NNODES "${NNODES}" 1
whole_number NODE_RANK "${NODE_RANK}" 0
whole_number MAX_RESTARTS "${MAX_RESTARTS}" 0
[[ ${LOG_RANK} =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "LOG_RANK = ${LOG_RANK}: must be ranks of this machine, such as 0 or 0,1"
((NODE_RANK < NNODES)) || fail "NODE_RANK = ${NODE_RANK}: must be less than NNODES = ${NNODES}"
# threads that spin while they wait make a job very slow on busy cores; titan_peer/common/cpu_threads.py does the same
if [[ -z ${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-} ]]; then export OMP_WAIT_POLICY=PASSIVE; fi

if [[ " $* " =~ \ --comm\.mode[\ =]fake_backend\  ]]; then
    # A dry run: one process acts as rank 0 of the job.
    RANK=0 WORLD_SIZE=$((NGPU * NNODES)) exec "${PYTHON}" -m titan_peer.train "$@"
fi
if ((NGPU == 1 && NNODES == 1 && MAX_RESTARTS == 0)); then
    # One process needs no rendezvous; it gets signals directly, and its exit status is that of this script.
    exec "${PYTHON}" -m titan_peer.train "$@"
fi
((NNODES == 1)) || [[ -n ${RDZV_ENDPOINT:-} ]] || fail "NNODES = ${NNODES}: needs RDZV_ENDPOINT, host:port of one of the machines"
RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:0}
exec "${PYTHON}" -m titan_peer.distributed.launch \
    --nnodes "${NNODES}" --node-rank "${NODE_RANK}" --nproc-per-node "${NGPU}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT}" --max-restarts "${MAX_RESTARTS}" \
    --local-ranks-filter "${LOG_RANK}" --role rank --tee 3 \
    -m titan_peer.train "$@"
