#!/bin/bash
#SBATCH --job-name=t1-convert
#SBATCH --account=my_account
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A Hugging Face folder into a Megatron checkpoint, or back.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/convert.sh [to-megatron HF_DIR OUT, to-hf CKPT OUT, verify A B]
RUN_DIR=${RUN_DIR:-/path/to/runs/convert}    # on a file system that all nodes share
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_convert "$@"
