#!/usr/bin/env bash
# A real SLURM on this machine, for tests: munge, slurmctld and one slurmd for each node, all of it in one folder.
#
#   bash scripts/slurm/local_cluster.sh start FOLDER [NODES]   # 1 node if not said; says what to export
#   export SLURM_CONF=FOLDER/slurm.conf                        # then sbatch, squeue and scontrol talk to it
#   bash scripts/slurm/local_cluster.sh status FOLDER          # exit code 3 if it does not run
#   bash scripts/slurm/local_cluster.sh stop FOLDER            # ends jobs and daemons; their logs stay in the folder
#
# Needs root and Debian's packages: apt-get install slurm-wlm munge. A job in the partition `high` preempts those in
# `low`: they are sent the signal of their --signal, have GRACE_SECONDS to end by themselves, and are queued again.
# Memory is not counted, and there is no accounting: sacct only prints an error.
set -euo pipefail

GRACE_SECONDS=60
CPUS_PER_NODE=2 # counted and not bound: the machine may have fewer

fail() {
    echo "local_cluster.sh: $1" >&2
    exit 1
}

daemons() { # in the order in which they start, called as their pid files are
    local node
    echo munged
    echo slurmctld
    for node in $(sed -n 's/^NodeName=\([^ ]*\) .*/\1/p' "$SLURM_CONF" 2>/dev/null); do
        echo "slurmd-$node"
    done
}

lives() { # pid; a zombie that nobody has waited for does not
    grep -qs '^State:.[^ZX]' "/proc/$1/status"
}

pid_of() { # daemon; fails if it does not run
    local pid
    pid=$(cat "$folder/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%-*}" ] &&
        lives "$pid" && echo "$pid"
}

is_up() {
    local daemon
    [ -f "$SLURM_CONF" ] || return 1
    for daemon in $(daemons); do
        pid_of "$daemon" >/dev/null || return 1
    done
}

is_ready() {
    is_up && [ "$(sinfo --noheader --partition=low --format=%t 2>/dev/null)" = idle ]
}

# What slurmd has started, found without asking it: the daemons of steps, and what runs under them.
job_processes() {
    local place
    for place in /proc/[0-9]*; do
        if grep -qszxF "SLURM_CONF=$SLURM_CONF" "$place/environ" && lives "${place#/proc/}" &&
            { grep -qsz '^SLURM_JOB_ID=' "$place/environ" || grep -qsx slurmstepd "$place/comm"; }; then
            echo "${place#/proc/}"
        fi
    done
}

is_quiet() {
    [ -z "$(job_processes)" ]
}

wait_until() { # seconds, command
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

free_ports() { # how many; below those that the kernel gives to connections
    local port=$((10000 + RANDOM % 10000)) wanted=$1
    while [ "$wanted" -gt 0 ]; do
        port=$((port + 1))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            wanted=$((wanted - 1))
        fi
    done
}

write_configuration() { # number of nodes
    local node ports
    mapfile -t ports < <(free_ports $(($1 + 1)))
    cat <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
CONF
    for ((node = 1; node <= $1; node++)); do
        echo "NodeName=node$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[node]} CPUs=$CPUS_PER_NODE"
    done
    echo "PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=$GRACE_SECONDS"
    echo "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF"
}

launch() {
    local daemon
    # --force: the folder may be closed to other users, for whom this cluster is not.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>/dev/null || return 1
    slurmctld -c || return 1
    for daemon in $(daemons); do
        if [[ $daemon = slurmd-* ]]; then
            mkdir -p "$folder/spool-${daemon#slurmd-}"
            slurmd -c -N "${daemon#slurmd-}" || return 1
        fi
    done
    wait_until 30 is_ready
}

start() { # number of nodes
    local program
    [ "$(id -u)" = 0 ] || fail "must be started by root"
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
    done
    [[ $1 =~ ^[1-9][0-9]?$ ]] || fail "NODES=$1 must be a number from 1 to 99"
    [ "${#folder}" -le 70 ] || fail "FOLDER=$folder must have at most 70 characters: sockets are made below it"
    if ! is_up; then
        stop # what is left of an earlier one
        mkdir -p "$folder/state"
        write_configuration "$1" >"$SLURM_CONF"
        (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
        launch || {
            stop
            fail "it does not start: see the logs in $folder"
        }
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local daemon pid
    if pid_of slurmctld >/dev/null; then
        # Ended at once and not told: nothing is to be saved and queued again.
        for daemon in low high; do
            timeout 10 scancel --partition=$daemon --full --signal=KILL || true
            timeout 10 scancel --partition=$daemon || true
        done
        wait_until 10 is_quiet || true
    fi
    for daemon in $(daemons | tac); do
        if pid=$(pid_of "$daemon"); then
            kill "$pid"
            wait_until 10 is_gone "$pid" || kill -KILL "$pid"
        fi
    done
    for pid in $(job_processes); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait_until 5 is_quiet || fail "these processes of jobs do not end: $(job_processes | tr '\n' ' ')"
}

is_gone() { # pid
    ! lives "$1"
}

status() {
    if ! is_up; then
        echo "stopped"
        return 3
    fi
    echo "running: export SLURM_CONF=$SLURM_CONF"
    sinfo
    squeue
}

[ $# -ge 2 ] && [[ $1 =~ ^(start|stop|status)$ ]] || {
    echo "usage: local_cluster.sh start FOLDER [NODES] | stop FOLDER | status FOLDER" >&2
    exit 2
}
PATH=$PATH:/usr/sbin
folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
"$1" "${3:-1}"
