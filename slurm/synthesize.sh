#!/bin/bash
#SBATCH --job-name=t1-synthesize
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
# SFT chains of trial, error and verification, by a model that is served on the job's node.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/synthesize.sh [options of t1]
MODEL=${MODEL:-/path/to/Qwen2.5-32B-Instruct} # Hugging Face folder
DATA=${DATA:-/path/to/data}                  # folder with questions.jsonl
RUN_DIR=${RUN_DIR:-/path/to/runs/synthesize} # on a file system that all nodes share
CONFIG=${CONFIG:-examples/qwen2.5-32b/synthesize.yaml} # settings of t1 synthesize
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_synthesize "$CONFIG" "$@"
