#!/bin/bash
#SBATCH --job-name=t1-evaluate
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
# Accuracy of a model on held-out questions, vLLM on every node.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/evaluate.sh [options of t1]
MODEL=${MODEL:-/path/to/runs/rl/rl/hf}       # Hugging Face folder
DATA=${DATA:-/path/to/data}                  # folder with heldout.jsonl
RUN_DIR=${RUN_DIR:-/path/to/runs/evaluate}   # on a file system that all nodes share
CONFIG=${CONFIG:-examples/qwen2.5-32b/rl.yaml} # settings; options after the script's name override them
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_evaluate "$CONFIG" "$@"
