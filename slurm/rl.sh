#!/bin/bash
#SBATCH --job-name=t1-rl
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
# T1's reinforcement learning, on 4 nodes of 8 x 80 GB; 9B to 32B by CONFIG.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/rl.sh [options of t1]
MODEL=${MODEL:-/path/to/runs/sft/sft/hf}     # Hugging Face folder: the fine-tuned model
DATA=${DATA:-/path/to/data}                  # folder with rl.jsonl; heldout.jsonl, if there, must share no question
RUN_DIR=${RUN_DIR:-/path/to/runs/rl}         # on a file system that all nodes share
CONFIG=${CONFIG:-examples/qwen2.5-32b/rl.yaml} # settings; options after the script's name override them
VLLM_NODES=${VLLM_NODES:-2}                  # nodes for vLLM, the others train; 0: every node does both (docs/cluster.md)
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_rl "$CONFIG" "$@"
