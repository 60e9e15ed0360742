#!/usr/bin/env bash
#SBATCH --job-name=clipmatch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=INT@120
#SBATCH --requeue
#SBATCH --output=%x-%j.txt
#
# A training run on the machines of a Slurm cluster, by runs/machine.sh on each. Submit it in this folder's parent, with
# an environment active that all machines see; options of sbatch go before the script, those of training after it:
#
#     sbatch --nodes=4 runs/slurm.sh OUT --captions "shards/{00000..01023}.tar" --stream --batch-size 4096 ...
#
# Two minutes before its time is over it saves and stops; it is requeued when a machine fails. Either way, submitted
# again with the same OUT it goes on, on any number of machines.
set -euo pipefail
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MAIN_ADDRESS
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine have their own
export MACHINES=$SLURM_JOB_NUM_NODES
export PROCESSES=${SLURM_GPUS_ON_NODE:-1}
# Without the first option, a machine that fails would leave the others waiting for it.
srun --kill-on-bad-exit=1 bash -c 'MACHINE_RANK=$SLURM_NODEID exec runs/machine.sh "$@"' machine "$@"
