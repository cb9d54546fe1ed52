#!/usr/bin/env bash
# A real SLURM on one machine: a host "login" (slurmctld) and hosts node1..N (slurmd), each in
# namespaces of its own, with its own address, hostname, processes, /tmp, /dev/shm and munged.
#
#   slurm_cluster.sh probe                      says what is missing, if something is
#   slurm_cluster.sh up DIR N [FOLDER ...]      prints "ready"; takes all down when its stdin ends
#   slurm_cluster.sh in DIR HOST COMMAND ...
#   slurm_cluster.sh crash|boot DIR HOST        the power of one host goes, and comes back
#
# FOLDERs are what all hosts see of /tmp, besides DIR.
set -euo pipefail

self=$(realpath "$0")
command=$1
dir=$(realpath -m "${2:-/}")
shift $(($# > 1 ? 2 : 1))
network=10.77.0 # each cluster has a network of its own: others may have the same
namespaces=(--net --uts --ipc --mount --pid --fork --kill-child --mount-proc)
cgroup=slurm-test${dir//\//-} # in the freezer's tree, with which SLURM finds a job's processes

within() { # HOST COMMAND ...: on that host
    nsenter --target "$(<"$dir/pids/$1")" --mount --uts --ipc --net --pid -- "${@:2}"
}

on_network_of() { # HOST COMMAND ...: with its network only, so that process ids keep their meaning
    nsenter --target "$(<"$dir/pids/$1")" --net -- "${@:2}"
}

boot() { # HOST: its namespaces, then its network, then its daemons
    local host=$1 number=${1#node}
    rm -f "$dir/pids/$host".*
    setsid unshare "${namespaces[@]}" bash "$self" init "$dir" "$host" \
        </dev/null >>"$dir/log/$host.out" 2>&1 &
    local outer=$!
    echo "$outer" >"$dir/pids/$host.outer"
    until [ -e "$dir/pids/$host.ready" ]; do
        sleep 0.02
        kill -0 "$outer"
    done
    tr -d ' ' <"/proc/$outer/task/$outer/children" >"$dir/pids/$host"
    on_network_of "$host" ip link set lo up
    if [ "$host" = login ]; then
        on_network_of login ip link add switch type bridge
        on_network_of login ip address add $network.1/24 dev switch
        on_network_of login ip link set switch up
    else
        on_network_of login ip link delete "port$number" 2>/dev/null || true # of a life before
        on_network_of login ip link add "port$number" type veth \
            peer name lan netns "$(<"$dir/pids/$host")"
        on_network_of login ip link set "port$number" master switch up
        on_network_of "$host" ip address add "$network.$((10 + number))/24" dev lan
        on_network_of "$host" ip link set lan up
    fi
    : >"$dir/pids/$host.go"
}

down() {
    local file
    for file in "$dir"/pids/*.outer; do
        kill -9 "$(<"$file")" "$(<"${file%.outer}")" 2>/dev/null || true
    done
    sleep 0.3 # until the cgroups are empty
    unshare --mount bash -c 'mount -t cgroup -o freezer cgroup /mnt &&
        find /mnt/"$0"-* -depth -type d -exec rmdir {} +' "$cgroup" 2>/dev/null || true
    rm -rf "$dir/pids"
}

write_settings() { # NODES
    local i
    mkdir -p "$dir"/{etc,pids,log,dev}
    head -c 128 /dev/urandom >"$dir/etc/munge.key"
    {
        echo "127.0.0.1 localhost"
        echo "$network.1 login"
        for ((i = 1; i <= $1; i++)); do
            echo "$network.$((10 + i)) node$i"
            echo "::ffff:$network.$((10 + i)) node$i" # as gloo asks for it
        done
    } >"$dir/etc/hosts"
    cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login
SlurmUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/cgroup
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
# what is minutes elsewhere: until a requeued job may start, until a silent node is down
AuthInfo=cred_expire=5
SlurmdTimeout=10
MessageTimeout=5
KillWait=10
ReturnToService=2
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-$1] CPUs=8 Gres=gpu:2
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10
CONF
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/run/cgroup\n' >"$dir/etc/cgroup.conf"
    printf 'AutoDetect=off\nName=gpu File=%s/dev/gpu[0-1]\n' "$dir" >"$dir/etc/gres.conf"
    mknod "$dir/dev/gpu0" c 1 3 # any character device passes for a GPU
    mknod "$dir/dev/gpu1" c 1 3
}

case $command in
probe)
    [ "$(id -u)" = 0 ] || { echo "root"; exit 1; }
    for tool in slurmctld slurmd sbatch munged ip unshare nsenter runuser; do
        command -v $tool >/dev/null || { echo "$tool"; exit 1; }
    done
    unshare "${namespaces[@]}" bash -c '
        mount -t tmpfs tmpfs /run && mkdir /run/cgroup &&
        mount -t cgroup -o freezer cgroup /run/cgroup && mkdir -p "/run/cgroup/$0" &&
        rmdir "/run/cgroup/$0" && ip link add switch type bridge && ip link add port type veth' \
        "$cgroup-probe" >&2 || { echo "leave to make namespaces, networks and cgroups"; exit 1; }
    ;;
up)
    nodes=$1
    shift
    trap down EXIT
    write_settings "$nodes"
    for folder in "$dir" "$@"; do echo "$folder"; done >"$dir/etc/shared"
    for host in login $(seq -f 'node%g' "$nodes"); do boot "$host"; done
    for ((i = 0; ; i++)); do
        [ "$(within login sinfo -h -N -p batch -t idle -o %N 2>/dev/null | wc -l)" != "$nodes" ] || break
        ((i < 600)) || { echo "the nodes did not come up: see $dir/log" >&2; exit 1; }
        sleep 0.1
    done
    echo ready
    cat >/dev/null # until whoever wants the cluster closes the pipe, or ends
    ;;
init) # process 1 of a host; its cgroup namespace begins in a cgroup of its own
    cd / # of the host itself, not of a folder that is hidden below
    hostname "$1"
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir /run/cgroup
    mount -t cgroup -o freezer cgroup /run/cgroup
    mkdir -p "/run/cgroup/$cgroup-$1"
    echo 0 >"/run/cgroup/$cgroup-$1/cgroup.procs"
    umount /run/cgroup
    exec unshare --cgroup bash "$self" init_within_cgroup "$dir" "$1"
    ;;
init_within_cgroup)
    mkdir -p /run/cgroup/freezer /run/shared /run/munge
    mount -t cgroup -o freezer cgroup /run/cgroup/freezer
    mapfile -t folders <"$dir/etc/shared"
    for i in "${!folders[@]}"; do
        mkdir "/run/shared/$i"
        mount --rbind "${folders[i]}" "/run/shared/$i"
    done
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    for i in "${!folders[@]}"; do
        mkdir -p "${folders[i]}"
        mount --move "/run/shared/$i" "${folders[i]}"
    done
    for device in /dev/nvidia*; do # the jobs here are for CPUs
        [ ! -c "$device" ] || mount --bind /dev/null "$device"
    done
    mount -t tmpfs -o mode=755 tmpfs /var/spool
    mkdir /var/spool/slurmctld /var/spool/slurmd
    mount -t tmpfs -o mode=755 tmpfs /var/log
    install -d -o munge /var/log/munge /run/munge
    install -o munge -m 400 "$dir/etc/munge.key" /run/munge/key
    mkdir -p /etc/slurm
    mount --bind "$dir/etc/hosts" /etc/hosts
    mount --bind "$dir/etc" /etc/slurm
    : >"$dir/pids/$1.ready"
    until [ -e "$dir/pids/$1.go" ]; do sleep 0.02; done
    runuser -u munge -- munged --key-file=/run/munge/key
    if [ "$1" = login ]; then slurmctld -D & else slurmd -D & fi
    while :; do # process 1 takes over what lost its parent
        sleep infinity &
        wait $!
    done
    ;;
in) within "$1" env -C "$PWD" "${@:2}" ;;
crash) kill -9 "$(<"$dir/pids/$1")" ;; # all on that host dies at once
boot) boot "$1" ;;
esac
