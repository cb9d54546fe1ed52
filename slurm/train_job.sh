# What one_node.sbatch and multi_node.sbatch share: start the processes, pass stop requests on to
# them, and requeue the job when they have saved. Sourced inside a SLURM job, with the config file and
# overrides as arguments.

set -u
cd "$SLURM_SUBMIT_DIR"
if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm/one_node.sbatch configs/X.yaml [key=value ...]" >&2
    exit 2
fi

# Python: the environment that RTL_DIST_ACTIVATE names (a file to source), else the project's own
# (made by `uv sync`), else whatever was active where sbatch was called.
activate=${RTL_DIST_ACTIVATE:-.venv/bin/activate}
if [ -n "${RTL_DIST_ACTIVATE:-}" ] || [ -e "$activate" ]; then
    set +u
    source "$activate" || exit 2
    set -u
fi

# One process per GPU of each node.
processes=${SLURM_GPUS_ON_NODE:-${RTL_DIST_PROCESSES:-1}}
processes=${processes##*:} # some versions of SLURM say "gpu:4"
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then
    echo "no GPU was asked for (sbatch --gpus-per-node=N): training on CPUs" >&2
fi

# Threads that would take turns on the same core are far slower than none. Unset, each process would
# take the whole machine's.
cores=$((SLURM_CPUS_ON_NODE / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}

# Where the processes meet: the first node, at a port of this job's own, below the ports that systems
# hand out by themselves.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# A stop request: from SLURM before time runs out (--signal), from preemption, or by hand.
stopping=
trap 'stopping=yes; echo "stop requested at $(date): saving" >&2; trap "" USR1 TERM' USR1 TERM

# Each srun task is a training process itself, with no launcher in between that would die of the
# signals meant for it and hide its exit code; rtl_dist reads its rank from SLURM. In the background,
# since bash runs traps only between commands and while it waits.
#   exec                  signals reach Python (under proctrack/cgroup only the task gets them)
#   trap '' USR1          one that comes before there is a handler must not kill srun or Python
#   --cpu-bind=none       processes share the node's cores by themselves
#   --gpu-bind=none       each process takes the GPU of its own number
#   --wait=300            when one process died, the others may not wait for it for ever
(
    trap '' USR1
    exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * processes)) \
        --ntasks-per-node="$processes" --overcommit --cpu-bind=none --gpu-bind=none \
        --kill-on-bad-exit=0 --wait=300 \
        bash -c 'trap "" USR1; exec python rtl_dist/train.py --config "$@"' train "$@"
) &
step=$!

while kill -0 "$step" 2>/dev/null; do
    # repeated, since a request that meets a process still importing is lost; srun passes it on
    [ -z "$stopping" ] || kill -USR1 "$step"
    sleep 2 &
    wait $! # until a signal comes, at most 2 s
done
wait "$step"
code=$?

# 75: stopped on request and saved. 143: ended by TERM before it had anything to save. Preemption with
# a grace time ends the processes only, and a job that then ends is not requeued by SLURM. A job that
# was cancelled is no longer RUNNING, and stays cancelled.
state=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o 'JobState=[A-Z_]*')
case $code in
75 | 143)
    if [ "$state" = JobState=RUNNING ]; then
        echo "requeueing job $SLURM_JOB_ID" >&2
        trap '' TERM # requeueing ends this script as well
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
