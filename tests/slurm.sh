#!/bin/sh
# A Slurm of this machine alone, for tests/test_processes.py: sudo apt-get install slurm-wlm munge, then, as root,
#   tests/slurm.sh FOLDER && pytest tests/test_processes.py -k slurm
# FOLDER is for its state and logs. It writes /etc/slurm/slurm.conf; `scontrol shutdown` ends it.
set -e
folder=$(realpath "$1") host=$(hostname -s)
mkdir -p "$folder" /run/munge /etc/slurm
chown munge /run/munge
pgrep -x munged > /dev/null || su munge -s /bin/sh -c munged
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=local
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host CPUs=$(nproc) State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld
slurmd
sleep 2
sinfo
