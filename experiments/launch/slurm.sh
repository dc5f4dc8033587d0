#!/bin/bash
# One process a node, each with all accelerators of its node, on a disk that all nodes share.
#
#   sbatch --nodes=4 experiments/launch/slurm.sh --config my.yaml mesh.fsdp=32
#
# Slurm sends SIGTERM two minutes before the limit: the run saves, exits with 75 and this script
# queues itself again, which resumes it. A node that fails ends the others, and the same follows.

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

# --kill-on-bad-exit: where one process has ended, do not wait for those of other nodes.
# -K0 leaves them the seconds to say why; they end by themselves with 75.
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi
srun --kill-on-bad-exit=0 --label \
    python -m experiments.run "$@" "${resume[@]}"
code=$?
if [ "$code" -eq "$RESUMABLE" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
