#!/bin/bash
# Several machines under Slurm: one task per GPU, Lightning reads the ranks from Slurm. Submit with
#   sbatch --nodes=2 --gpus-per-node=8 demo/slurm.sh
# Variables of demo-state-tuning.sh may be set before, as in micro_bsz=8 sbatch ... When the time is up Slurm sends
# SIGTERM: the run saves itself and ends; submitted again, it resumes.
#SBATCH --job-name=rwkv_speech
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=SIGTERM@120
#SBATCH --requeue
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)}

# torchrun instead of Slurm, on each machine:
#   torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=FIRST_HOST:29500 \
#       train.py --num_nodes 2 --device 8 --strategy deepspeed_stage_1 ...
. "$root/demo/env.sh"
setup_environment
# The tasks use the environment that was made here once.
export PYTHON=$python venv=none
export device=${device:-${SLURM_GPUS_ON_NODE:-8}}
exec srun sh "$root/demo/demo-state-tuning.sh" --num_nodes "${SLURM_JOB_NUM_NODES:-1}" \
    --strategy "${strategy:-deepspeed_stage_1}" "$@"
