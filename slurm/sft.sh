#!/bin/bash
#SBATCH --job-name=t1-sft
#SBATCH --account=my_account
#SBATCH --partition=gpu
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# T1's supervised fine-tuning on chains of trial, error and verification.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/sft.sh [options of t1]
MODEL=${MODEL:-/path/to/Qwen2.5-32B}         # Hugging Face folder of the base model
DATA=${DATA:-/path/to/data}                  # folder with sft.jsonl
RUN_DIR=${RUN_DIR:-/path/to/runs/sft}        # on a file system that all nodes share
CONFIG=${CONFIG:-examples/qwen2.5-32b/sft.yaml} # settings; options after the script's name override them
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_sft "$CONFIG" "$@"
