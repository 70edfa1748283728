#!/usr/bin/env bash
# Trains on a SLURM cluster, one process for each GPU; goes on by itself after a preemption or the time limit.
#
#     sbatch --nodes=4 tools/launch/slurm.sh --config=configs/paper/base_632m.py --workdir=/shared/runs/base
#
# Arguments of sbatch come before the script's name and win over the lines below; those after it go to train.py.
# Submit from the folder that holds train.py, with the environment active; both must be on a disk that all nodes share.
#SBATCH --job-name=muse
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

# JAX takes the GPU whose number is the task's own on its node, so every task must see all of them: no binding.
srun --gpu-bind=none --kill-on-bad-exit=0 "${PYTHON:-python}" train.py --distributed "$@"
code=$?

# 143: SIGTERM, and what was reached is saved. 75: another process was lost, or nothing moved. The same command goes on
# in both cases; what keeps being lost is no accident, so not for ever.
if [[ $code -eq 143 || ($code -eq 75 && ${SLURM_RESTART_COUNT:-0} -lt 20) ]]; then
  echo "train.py ended with $code: queued again, to go on from the newest checkpoint"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
