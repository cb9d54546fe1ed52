# shellcheck shell=bash
# What the batch scripts share: start the processes, pass stop requests on to them, and requeue the
# job when they have saved. Sourced inside a SLURM job, with the config file and overrides as
# arguments.

set -u
cd "$SLURM_SUBMIT_DIR" || exit 2
if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm/one_node.sbatch configs/X.yaml [key=value ...]" >&2
    exit 2
fi

# Python: the environment that RTL_DIST_ACTIVATE names (a file to source), else the project's own
# (made by `uv sync`), else whatever was active where sbatch was called.
activate=${RTL_DIST_ACTIVATE:-.venv/bin/activate}
if [ -n "${RTL_DIST_ACTIVATE:-}" ] || [ -e "$activate" ]; then
    set +u
    # shellcheck source=/dev/null
    source "$activate" || exit 2
    set -u
fi

nodes=${RTL_DIST_NODES:-$SLURM_JOB_NUM_NODES} # preemptible.sbatch may use fewer than it was given
# One process per GPU of each node.
processes=${SLURM_GPUS_ON_NODE:-${RTL_DIST_PROCESSES:-1}}
processes=${processes##*:} # some versions of SLURM say "gpu:4"
if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then
    echo "no GPU was asked for (sbatch --gpus-per-node=N): training on CPUs" >&2
fi

# Threads that would take turns on the same core are far slower than none. Unset, each process would
# take the whole machine's.
# shellcheck disable=SC2153
cores=$((SLURM_CPUS_ON_NODE / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}

# A stop request: from SLURM before time runs out (--signal), from preemption, or by hand.
stopping=
trap 'stopping=yes; echo "stop requested at $(date): saving" >&2; trap "" USR1 TERM' USR1 TERM

# Each srun task is a training process itself, with no launcher in between that would die of the
# signals meant for it and hide its exit code. rtl_dist reads its rank, and on which node and port
# the processes meet, from what SLURM says of the step; so the shell that sbatch was called from must
# not have said anything else. In the background, since bash runs traps only between commands and
# while it waits.
#   exec                  signals reach Python (under proctrack/cgroup only the task gets them)
#   trap '' USR1          one that comes before there is a handler must not kill srun or Python
#   --cpu-bind=none       processes share the node's cores by themselves
#   --gpu-bind=none       each process takes the GPU of its own number
#   --export=ALL          what was set here reaches them, after sbatch --export=NONE too
#   --wait                when a process died, the others may not wait for it for ever, but longer than
#                         SLURM needs to see that a node is lost: then it requeues the job itself
node_timeout=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
patience=$((2 * ${node_timeout:-300} + 60))
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
(
    trap '' USR1
    exec srun --nodes="$nodes" --ntasks=$((nodes * processes)) --ntasks-per-node="$processes" \
        --overcommit --cpu-bind=none --gpu-bind=none --kill-on-bad-exit=0 --wait="$patience" \
        --export=ALL \
        bash -c 'trap "" USR1; exec python rtl_dist/train.py --config "$@"' train "$@"
) &
step=$!

while kill -0 "$step" 2>/dev/null; do
    # Repeated, since a request that meets a process still importing is lost; srun passes it on. Only
    # USR1 may be: to a second TERM a process that is saving would leave at once.
    [ -z "$stopping" ] || kill -USR1 "$step"
    sleep 2 &
    wait $! # until a signal comes, at most 2 s
done
wait "$step"
code=$?

# A task of an array goes by its place in it: the job number of one of them stands for them all.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# 75: stopped on request and saved. 143: ended by TERM before it had anything to save. Preemption with
# a grace time ends the processes only, and a job that then ends is not requeued by SLURM. A job that
# was cancelled is no longer RUNNING, and stays cancelled, as one that SLURM requeued stays requeued.
requeue() {
    local state try
    for try in 1 2 3 4 5; do # the controller may be busy
        state=$(scontrol show job "$job" --oneliner | grep -o 'JobState=[A-Z_]*')
        case $state in
        JobState=RUNNING)
            echo "requeueing job $job" >&2
            trap '' TERM # requeueing ends this script as well
            scontrol requeue "$job" && return
            ;;
        ?*) return ;;
        esac
        sleep $((5 * try))
    done
    echo "job $job is saved but could not be requeued: submit it again to go on" >&2
}
case $code in
75 | 143) requeue ;;
esac
exit "$code"
