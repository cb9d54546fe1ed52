#!/usr/bin/env bash
# Trains on however many machines there are, between one and four, and goes on when one is lost or
# comes back: the processes are started again and go on from the newest checkpoint. On every machine:
#
#   HOST=first-machine launch/elastic.sh configs/transfer.yaml batch.micro=4 run.dir=runs/first
#
# HOST is the machine, reachable from all, that keeps the list of members: as long as it stays up, any
# other may go at any moment. All need the same code, the data under the same path, and a run folder
# (run.dir) on a disk they share. What is left trains if its number of processes divides that of the
# microbatches (batch.global / batch.micro); of others the largest such number trains, the rest stands
# by. The result is the same. So give batch.micro, as here: it is part of the run, and where it is auto it
# is as large as suits the processes of the first start (4 makes 8 microbatches of a batch of 32).
#
#   NODES=1:4        the fewest and the most machines
#   PROCESSES=8      on each machine (default: one per GPU, or 1)
#   PORT=29400       of HOST, open to the others
#   JOB=name         tells jobs of one HOST apart
#   RESTARTS=100     how often the processes may be started again
#
# Stop it with SIGTERM or Ctrl-C to this script: the run saves itself; start it again to go on.
set -euo pipefail
if [ $# -eq 0 ] || [ -z "${HOST:-}" ]; then
    echo "usage: HOST=machine launch/elastic.sh configs/X.yaml [key=value ...]" >&2
    exit 2
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec torchrun \
    --nnodes="${NODES:-1:4}" \
    --nproc-per-node="${PROCESSES:-$((gpus > 0 ? gpus : 1))}" \
    --max-restarts="${RESTARTS:-100}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HOST:${PORT:-29400}" \
    --rdzv-id="${JOB:-rtl_dist}" \
    --rdzv-conf=last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=5 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
    rtl_dist/train.py --config "$@"
