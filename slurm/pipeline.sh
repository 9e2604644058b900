#!/bin/bash
# The whole recipe as a chain of jobs, each submitted to begin when the one before has succeeded.
#
#   MODEL=... DATA=... RUN_DIR=... slurm/pipeline.sh [options of t1 for every stage]     submits what is not done yet
#   RUN_DIR=... slurm/pipeline.sh status                                                 says where it stands
#
# A chain that broke is gone on with by the same command: what is done, or on its way, is not done again. Account and
# partition are those of the scripts, or SBATCH_ACCOUNT and SBATCH_PARTITION; SBATCH_OPTIONS are further words for sbatch.
set -euo pipefail
T1_HOME=${T1_HOME:-$PWD}
MODEL=${MODEL:-}                                    # Hugging Face folder of the base model
SYNTHESIZE_MODEL=${SYNTHESIZE_MODEL:-$MODEL}        # of the model that writes the chains: an instructed one
DATA=${DATA:-}                                      # folder with sft.jsonl or questions.jsonl, rl.jsonl or raw.jsonl, heldout.jsonl
RUN_DIR=${RUN_DIR:?folder of the run, on a file system that all nodes share}
CONFIGS=${CONFIGS:-examples/qwen2.5-32b}            # folder with sft.yaml, rl.yaml, and synthesize.yaml where chains are written
[ -f "$T1_HOME/slurm/lib.sh" ] || { echo "start it in the project's folder, or set T1_HOME to it"; exit 2; }
if [ -z "${STAGES:-}" ]; then
  STAGES='sft rl evaluate scaling'
  [ -f "$DATA/rl.jsonl" ] || STAGES='sft curate rl evaluate scaling'
  [ -f "$DATA/sft.jsonl" ] || STAGES="synthesize $STAGES"
fi
mkdir -p "$RUN_DIR/pipeline"
JOBS=$RUN_DIR/pipeline/jobs # a line a stage: its name, its job
declare -A RESULT=(
  [synthesize]=synthesize/sft.jsonl [sft]=sft/hf/config.json [curate]=curate/prompts.jsonl [rl]=rl/hf/config.json
  [evaluate]=evaluate/rl/sets.json [scaling]=scaling/rl/points.json
)

job_of() { sed -n "s/^$1 //p" "$JOBS" 2>/dev/null || true; }

# Without -t, which misses a job that completes to be requeued, or whose nodes are being booted.
is_on_its_way() { [ -n "$(squeue -h -o %i -j "$1" 2>/dev/null)" ]; }

# Job by job, lest a refused one hide those before it from a second call, which would submit them again.
remember() {
  local others
  others=$(sed "/^$1 /d" "$JOBS" 2>/dev/null || true)
  printf '%s\n' ${others:+"$others"} "$1 $2" >"$JOBS"
}

is_done() { [ -e "$RUN_DIR/${RESULT[$1]}" ]; }

status() {
  local stage job state
  while read -r stage job; do
    state=$(scontrol show job "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\) Reason=\(.*\) Dep.*/\1 (\2)/p' || true)
    ! is_done "$stage" || state=finished
    echo "$stage: job $job ${state:-is not known to Slurm any more, and left no result}"
  done <"$JOBS"
}

if [ "${1:-}" = status ]; then
  [ -f "$JOBS" ] || { echo "no chain was submitted for $RUN_DIR"; exit 2; }
  status
  exit
fi
has() { [[ " $STAGES " = *" $1 "* ]]; }

# What an earlier stage of the chain wrote, or will have written: by STAGES, or there from a call before.
made() { has "$1" || is_done "$1"; }

config_of() {
  case $1 in
    synthesize | sft) echo "$CONFIGS/$1.yaml" ;;
    *) echo "$CONFIGS/rl.yaml" ;;
  esac
}

: "${MODEL:?}" "${DATA:?}"
export T1_HOME DATA RUN_DIR
for stage in $STAGES; do # nothing is submitted of a chain that can't end
  [ -n "${RESULT[$stage]:-}" ] || { echo "STAGES has $stage; there are ${!RESULT[*]}"; exit 2; }
  config=$(config_of "$stage")
  [[ $config = /* ]] || config=$T1_HOME/$config
  is_done "$stage" || [ -f "$config" ] || { echo "$stage: $config is not there: CONFIGS names the folder of the settings"; exit 2; }
done
before=
for stage in $STAGES; do
  if is_done "$stage"; then
    echo "$stage: done"
    continue
  fi
  job=$(job_of "$stage")
  if [ -n "$job" ] && is_on_its_way "$job"; then
    echo "$stage: job $job is on its way (to submit it anew, scancel it first)"
    before=$job
    continue
  fi
  model=$RUN_DIR/rl/hf options=("$@")
  case $stage in
    synthesize) model=$SYNTHESIZE_MODEL options=() ;;
    sft) model=$MODEL ;;
    curate | rl) model=$RUN_DIR/sft/hf ;;
    *) options+=(--label rl) ;;
  esac
  [ "$stage" != sft ] || ! made synthesize || options=(--data.sft "$RUN_DIR/synthesize/sft.jsonl" "$@")
  [ "$stage" != rl ] || ! made curate || options=(--data.train "$RUN_DIR/curate/prompts.jsonl" "$@")
  # shellcheck disable=SC2086  # words
  job=$(MODEL=$model CONFIG=$(config_of "$stage") sbatch --parsable --export=ALL ${SBATCH_OPTIONS:-} ${before:+--dependency=afterok:$before} \
    --kill-on-invalid-dep=yes "$T1_HOME/slurm/$stage.sh" ${options[@]+"${options[@]}"})
  before=${job%%;*}
  remember "$stage" "$before"
  echo "$stage: submitted as job $before"
done
