#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for tests: `cluster.sh start DIR` (as root, with slurm-wlm and munge
# installed), `cluster.sh stop DIR`. State and logs lie in DIR; it takes /etc/slurm and the hosts' names n1 and n2.
set -euo pipefail
what=$1
dir=$(mkdir -p "$2" && cd "$2" && pwd)

stop() {
    local file
    for file in "$dir"/slurmd-n1.pid "$dir"/slurmd-n2.pid "$dir"/slurmctld.pid; do
        [[ -s $file ]] && kill "$(cat "$file")" 2>/dev/null || true
    done
}

configuration() {
    cat <<END
ClusterName=tests
SlurmctldHost=$1(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire=10
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=60
MinJobAge=300
NodeName=n[1-2] NodeHostname=$1 NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
END
}

start() {
    local host
    host=$(hostname -s)
    mkdir -p "$dir"/{state,spool-n1,spool-n2} /etc/slurm /run/munge /var/log/munge /var/lib/munge
    [[ -s /etc/munge/munge.key ]] || { dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key 2>/dev/null; chmod 400 /etc/munge/munge.key; }
    chown -R munge: /run/munge /var/log/munge /var/lib/munge /etc/munge
    grep -q ' n1 n2' /etc/hosts || echo '127.0.0.1 n1 n2' >>/etc/hosts
    grep -qw "$host" /etc/hosts || echo "127.0.0.1 $host" >>/etc/hosts
    configuration "$host" >/etc/slurm/slurm.conf
    echo 'CgroupAutomount=no' >/etc/slurm/cgroup.conf
    pgrep -x munged >/dev/null || su -s /bin/sh munge -c /usr/sbin/munged
    slurmctld && slurmd -N n1 && slurmd -N n2
    for _ in $(seq 120); do
        [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 2 ]] && return
        sleep 0.5
    done
    echo "SLURM did not come up: see $dir" >&2
    return 1
}

"$what"
