#!/bin/bash
#SBATCH --job-name=t1-qwen14b
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
# T1's reinforcement learning of Qwen2.5-14B on 4 nodes of 8 x 80 GB.
# Edit account, partition (above) and the paths (below); then: sbatch slurm/t1_qwen14b.sh [options of t1]
MODEL=${MODEL:-/path/to/Qwen2.5-14B-sft}     # Hugging Face folder: the fine-tuned model of slurm/sft.sh (RUN_DIR/sft/hf)
DATA=${DATA:-/path/to/data}          # folder with rl.jsonl
RUN_DIR=${RUN_DIR:-/path/to/runs/t1-qwen14b} # on a file system that all nodes share
VLLM_NODES=${VLLM_NODES:-2}             # nodes for vLLM, the others train; 0: every node does both, VLLM_GPUS of its GPUs for vLLM (half)
# shellcheck source=slurm/lib.sh
source "${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || { echo "submit from the project's folder, or set T1_HOME to it"; exit 2; }
t1_rl examples/qwen2.5-14b/rl.yaml "$@"
