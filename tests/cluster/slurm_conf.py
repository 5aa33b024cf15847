"""slurm.conf of the cluster that the tests run on."""

CONF = """
ClusterName=cairn
SlurmctldHost=head({network}254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={short}/munge,cred_expire={credential}
StateSaveLocation={folder}/state
SlurmdSpoolDir={short}/%n
SlurmctldPidFile={short}/slurmctld.pid
SlurmdPidFile={short}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# A node may claim more cores than the machine has.
SlurmdParameters=config_overrides
# Preemption sends the signal that `sbatch --signal` names, not SIGTERM.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
# A node that is back may work again, one that is silent for 10 s is lost.
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=5
MinJobAge=3600
InactiveLimit=0
NodeName=n[1-{nodes}] NodeAddr={network}[1-{nodes}] CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=30 MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL DefaultTime=30 MaxTime=60 PriorityTier=9 PreemptMode=OFF
"""
