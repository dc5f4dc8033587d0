#!/bin/bash
# One process a node, each with all accelerators of its node, on a disk that all nodes share.
#
#   sbatch --nodes=4 experiments/launch/slurm.sh --config my.yaml mesh.fsdp=32
#
# Slurm sends SIGTERM two minutes before the limit: the run saves, exits with 75 and this script
# queues itself again, which resumes it. A node that fails ends the others, and the same follows.
# Several processes stop at a step that is logged: where log_every steps and a checkpoint take longer
# than two minutes, raise the seconds of --signal (a job killed at its limit is not queued again).

#SBATCH --job-name=rabit-jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
RESUMABLE=75
MOST=100 # restarts: a crash of one process makes the others exit with 75, and srun with the highest

restarts=${SLURM_RESTART_COUNT:-0}
if [ "$restarts" -gt 0 ]; then set -- "$@" --resume; fi
# Where one process has ended those of other nodes are not killed: they say why and end by
# themselves with 75. From Slurm 22.05 to 23.02 srun does not take --cpus-per-task from sbatch.
srun --kill-on-bad-exit=0 --label ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    python -m experiments.run "$@"
code=$?
if [ "$code" -eq "$RESUMABLE" ] && [ "$restarts" -lt "$MOST" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
