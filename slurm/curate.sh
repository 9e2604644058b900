#!/bin/bash
#SBATCH --job-name=t1-curate
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
# What becomes a question for RL: raw questions cleaned, and those kept that the model solves seldom.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/curate.sh [options of t1]
MODEL=${MODEL:-/path/to/runs/sft/sft/hf}     # Hugging Face folder: the fine-tuned model
DATA=${DATA:-/path/to/data}                  # folder with raw.jsonl; what is in heldout.jsonl, if there, is left out
RUN_DIR=${RUN_DIR:-/path/to/runs/curate}     # on a file system that all nodes share
CONFIG=${CONFIG:-examples/qwen2.5-32b/rl.yaml} # settings; options after the script's name override them
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_curate "$CONFIG" "$@"
