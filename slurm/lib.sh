# shellcheck shell=bash
# What the batch scripts of this folder share: placing trainer and servers, watching them, stopping and going on.
#
#   t1_rl CONFIG [OPTIONS]            trainer on the first nodes, vLLM servers on the last VLLM_NODES
#   t1_sft CONFIG [OPTIONS]           trainer on all nodes
#   t1_evaluate CONFIG [OPTIONS]      one process on the first node, vLLM servers on all nodes; t1_scaling, t1_curate too
#   t1_synthesize CONFIG [OPTIONS]    one process on the first node, vLLM servers beside it
#   t1_convert WORDS...               one process on the first node
#
# OPTIONS are options of the `t1` command (--rl.steps 100). Where DATA has heldout.jsonl, RL gets it as data.heldout and
# curation as curate.evaluation, unless CONFIG or OPTIONS set these. With T1_DRY_RUN=1 and
# T1_NODES="NAME NAME ..." the srun commands for these nodes are printed, not run. With T1_CONTAINER=IMAGE all of them run
# in a container: by Apptainer when IMAGE ends in .sif, by the pyxis plugin of Slurm otherwise. It sees T1_HOME, RUN_DIR,
# MODEL and DATA, or the folders in T1_MOUNTS (A,B), and T1_PYTHON is the Python inside.
#
# USR1 (Slurm sends it before the time limit, #SBATCH --signal=B:USR1@1800) -> the trainer drops its step, writes a
# checkpoint and exits with 75 -> the job is requeued and goes on from there. A rank that was killed -> the
# trainer is started again from the newest checkpoint while the servers stay up, RESTARTS times without a step between.
# A node that fails -> Slurm requeues the job. Any other end of the trainer ends the job with its exit code.

set -uo pipefail
T1_HOME=${T1_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
T1_CONTAINER=${T1_CONTAINER:-}
[ -n "$T1_CONTAINER" ] && T1_PYTHON=${T1_PYTHON:-python3}
T1_PYTHON=${T1_PYTHON:-$T1_HOME/.venv/bin/python}
VLLM_NODES=${VLLM_NODES:-0}
VLLM_GPUS=${VLLM_GPUS:-}          # of every node, when VLLM_NODES=0; unset: half, or all with rollout.share_gpus
VLLM_TP=${VLLM_TP:-}              # GPUs of one server; unset: rollout.tp
RANKS=${RANKS:-}                  # trainer processes on a node; unset: one on each GPU that is not for vLLM
SERVERS_PER_NODE=${SERVERS_PER_NODE:-}  # unset: as many as its GPUs for vLLM hold
RESTARTS=${RESTARTS:-3}
GRACE_S=${GRACE_S:-1740}          # from USR1 to the end, when the trainer does not stop by itself: 60 less than --signal says
STOPPED=75                        # exit code of a trainer that stopped as asked
JOB=${SLURM_JOB_ID:-0}
SESSION=$JOB.${SLURM_RESTART_COUNT:-0}
export PYTHONPATH=$T1_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export SLURM_EXPORT_ENV=ALL       # what is exported here reaches the steps of a job submitted with --export=A,B or NONE too
# What is compiled stays on each node: all ranks at once would write into a home folder on the network.
caches=/tmp/t1_${USER:-$UID}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton} VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$caches/vllm}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/torchinductor}

ASKED_TO_STOP=
TRAINER=
KEEPERS=()
PYXIS=()                          # options of srun, and
APPTAINER=()                      # words before a command, that bring it into the container

say() { echo "$(date '+%F %T') job $SESSION: $*"; }

fail() { # EXIT_CODE WORDS...: the job's last line
  local code=$1
  shift
  end_steps
  say "FAILED: $*"
  exit "$code"
}

t1_rl() {
  local config=$1
  shift
  prepare rl "$config" ${DATA:+--data.train "$DATA/rl.jsonl"} "$@"
  local train_nodes=$((${#NODES[@]} - VLLM_NODES)) ranks=$GPUS first_gpu=0
  ((train_nodes >= 1)) || fail 2 "VLLM_NODES=$VLLM_NODES of ${#NODES[@]} nodes leaves none to train: lower it or ask for more nodes"
  local -a serve_on=("${NODES[@]:train_nodes}")
  if ((VLLM_NODES == 0)); then
    serve_on=("${NODES[@]}") first_gpu=$((GPUS - VLLM_GPUS))
    $SHARES || ranks=$first_gpu
    ((ranks >= 1)) || fail 2 "VLLM_GPUS=$VLLM_GPUS of $GPUS GPUs leaves none to train"
  fi
  OPTIONS+=(--rollout.load_weights false) # the trainer pushes its own
  start_servers "$first_gpu" "${serve_on[@]}"
  run_trainer rl "${RANKS:-$ranks}" "${NODES[@]:0:train_nodes}"
}

t1_sft() {
  local config=$1
  shift
  VLLM_NODES=0
  prepare sft "$config" ${DATA:+--data.sft "$DATA/sft.jsonl"} "$@"
  run_trainer sft "${RANKS:-$GPUS}" "${NODES[@]}"
}

t1_evaluate() { ask evaluate "${DATA:+--data.heldout=$DATA/heldout.jsonl}" "$@"; }

t1_scaling() { ask scaling "${DATA:+--data.heldout=$DATA/heldout.jsonl}" "$@"; }

t1_curate() { ask curate "${DATA:+--curate.inputs=[$DATA/raw.jsonl]}" "$@"; }

t1_synthesize() {
  local config=$1
  shift
  VLLM_NODES=0
  find_nodes synthesize
  [[ $config = /* ]] || config=$T1_HOME/$config
  [ -f "$config" ] || fail 2 "CONFIG=$config is not there: the chains' settings are those of t1 synthesize"
  VLLM_TP=${VLLM_TP:-$(settings rollout.tp --config "$config" "$@")}
  OPTIONS=(--config "$config" --model "$MODEL" --questions "$DATA/questions.jsonl" --out "$RUN_DIR/synthesize"
    --rollout.tp "$VLLM_TP" --rollout.num_servers "${SERVERS_PER_NODE:-$((GPUS / VLLM_TP))}" "$@")
  run_trainer synthesize 1 "${NODES[0]}"
}

t1_convert() {
  VLLM_NODES=0
  find_nodes convert
  OPTIONS=("$@")
  run_trainer convert 1 "${NODES[0]}"
}

ask() { # COMMAND DATA_OPTION CONFIG OPTIONS...
  local command=$1 data=$2 config=$3
  VLLM_NODES=0
  shift 3
  prepare "$command" "$config" ${data:+"$data"} "$@"
  start_servers 0 "${NODES[@]}"
  run_trainer "$command" 1 "${NODES[0]}"
}

find_nodes() { # COMMAND: nodes, logs, signals, container
  LOGS=$RUN_DIR/logs
  GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
  GPUS=${GPUS##*:}
  CPUS=${SLURM_CPUS_PER_TASK:-1}
  if [ -n "${T1_DRY_RUN:-}" ]; then
    read -ra NODES <<<"${T1_NODES:?names of the nodes, with T1_DRY_RUN=1}"
    enter_container
    return
  fi
  [ -n "${SLURM_JOB_NODELIST:-}" ] || fail 2 "not in a Slurm job: submit this script with sbatch"
  mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  trap on_usr1 USR1
  say "$1 on ${NODES[*]}, $VLLM_NODES of them for vLLM alone, logs in $LOGS"
  mkdir -p "$LOGS" || fail 2 "RUN_DIR=$RUN_DIR can't be made: set it to a folder that all nodes share"
  enter_container
  [ -n "$T1_CONTAINER" ] || command -v "$T1_PYTHON" >/dev/null || fail 2 "there is no Python at $T1_PYTHON: set T1_PYTHON to that of the environment with megatron_t1's requirements"
}

enter_container() {
  [ -n "$T1_CONTAINER" ] || return 0
  local mounts
  mounts=${T1_MOUNTS:-$(printf '%s\n' "$T1_HOME" "$RUN_DIR" "${MODEL:-}" "${DATA:-}" | grep . | sort -u | paste -sd,)}
  if [[ $T1_CONTAINER = *.sif ]]; then
    APPTAINER=(apptainer exec --nv --bind "$mounts" "$T1_CONTAINER")
  else
    PYXIS=("--container-image=$T1_CONTAINER" "--container-mounts=$(sed -E 's/([^,]+)/\1:\1/g' <<<"$mounts")")
  fi
}

python() { # the job's Python, in its container
  if [ -n "${T1_DRY_RUN:-}" ]; then
    "$T1_PYTHON" "$@"
  elif ((${#PYXIS[@]})); then
    srun --overlap --nodes=1 --ntasks=1 "--nodelist=${NODES[0]}" --mem=0 --input=none "${PYXIS[@]}" "$T1_PYTHON" "$@"
  else
    ${APPTAINER[@]+"${APPTAINER[@]}"} "$T1_PYTHON" "$@"
  fi
}

prepare() { # COMMAND CONFIG OPTIONS...: all of `find_nodes`, and options; refuses what would fail later
  local command=$1 config=$2
  shift 2
  find_nodes "$command"
  [[ $config = /* ]] || config=$T1_HOME/$config
  local tp heldout evaluation
  read -r tp SHARES heldout evaluation < <(settings "rollout.tp rollout.share_gpus data.heldout curate.evaluation" --config "$config" "$@")
  VLLM_TP=${VLLM_TP:-$tp}
  [ "$SHARES" = true ] && VLLM_GPUS=${VLLM_GPUS:-$GPUS}
  VLLM_GPUS=${VLLM_GPUS:-$((GPUS / 2))}
  # What the model will be measured on stays out of what it learns.
  if [ -f "${DATA:-}/heldout.jsonl" ]; then
    case $command.$heldout.$evaluation in
      rl.none.*) set -- --data.heldout "$DATA/heldout.jsonl" "$@" ;;
      curate.*.'()') set -- "--curate.evaluation=[$DATA/heldout.jsonl]" "$@" ;;
    esac
  fi
  OPTIONS=(--config "$config" --run_dir "$RUN_DIR" --model.hf_path "$MODEL" "$@" --resume)
  REGISTRY=$RUN_DIR/servers/$SESSION
  [ -z "${T1_DRY_RUN:-}" ] || return 0
  [ "$command" = curate ] && command=serve # what it needs of the machines
  python -m megatron_t1 check --for "$command" --nodes "${#NODES[@]}" --vllm_nodes "$VLLM_NODES" \
    --gpus_per_node "$GPUS" --vllm_gpus "$VLLM_GPUS" ${RANKS:+--ranks_per_node "$RANKS"} --grace_s "$GRACE_S" "${OPTIONS[@]}" --rollout.tp "$VLLM_TP" ||
    fail 2 "t1 check refused the configuration: see above"
}

on_usr1() {
  ASKED_TO_STOP=1
  say "asked to stop: the trainer drops its step and writes a checkpoint"
  [ -n "$TRAINER" ] && stop_trainer
}

stop_trainer() {
  kill -USR1 "$TRAINER" # srun hands it to all ranks
  (sleep "$GRACE_S" && kill -KILL "$TRAINER") 2>/dev/null &
}

# One step of the job on some of its nodes, in the background; its process id is in $!.
step() { # LOG NUM_NODES TASKS_PER_NODE NODELIST COMMAND...
  local log=$1 num_nodes=$2 tasks=$3 nodelist=$4
  shift 4
  local -a command=(srun --overlap "--nodes=$num_nodes" "--ntasks-per-node=$tasks" "--ntasks=$((num_nodes * tasks))"
    "--nodelist=$nodelist" "--cpus-per-task=$((CPUS / tasks > 0 ? CPUS / tasks : 1))" --mem=0
    --kill-on-bad-exit=1 --unbuffered --input=none "--output=$log" --open-mode=append ${PYXIS[@]+"${PYXIS[@]}"}
    ${APPTAINER[@]+"${APPTAINER[@]}"} "$@")
  if [ -n "${T1_DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  say "starts on $nodelist" >>"$log"
  exec "${command[@]}"
}

start_servers() { # FIRST_GPU NODES...: servers on the GPUs of each node from FIRST_GPU on, and a keeper for each node
  local first_gpu=$1 per_node=${SERVERS_PER_NODE:-$(((GPUS - $1) / VLLM_TP))} node
  shift
  ((per_node >= 1)) || fail 2 "rollout.tp = $VLLM_TP is more than the $((GPUS - first_gpu)) GPUs that each node has for vLLM"
  OPTIONS+=(--rollout.registry "$REGISTRY" --rollout.num_servers "$per_node" --rollout.tp "$VLLM_TP"
    --rollout.gpu_ids "[$(seq -s, "$first_gpu" $((first_gpu + per_node * VLLM_TP - 1)))]")
  for node in "$@"; do
    if [ -n "${T1_DRY_RUN:-}" ]; then
      serve "$node"
    else
      keep_serving "$node" &
      KEEPERS+=($!)
    fi
  done
  OPTIONS+=(--rollout.await_servers $((per_node * $#)))
}

serve() { # NODE
  step "$LOGS/serve_$1.log" 1 1 "$1" "$T1_PYTHON" -m megatron_t1 serve "${OPTIONS[@]}" --rollout.host auto
}

keep_serving() { # NODE: its `t1 serve` keeps the servers up; this keeps `t1 serve` up
  local step_pid='' code=0 tries=0
  trap 'kill -USR1 "$step_pid"; wait "$step_pid"; exit 0' TERM # srun would kill its tasks on TERM, it hands on USR1
  while :; do
    serve "$1" &
    step_pid=$!
    wait "$step_pid"
    code=$?
    ((code > 128)) || break # it ended by itself and has said why
    ((tries++ < RESTARTS)) || break
    say "the servers on $1 were killed (exit code $code) and are started again"
    sleep 2
  done
  say "the servers on $1 ended (exit code $code): $(last_words "$LOGS/serve_$1.log")"
  exit 1
}

run_trainer() { # COMMAND RANKS_PER_NODE NODES...
  local what=$1 ranks=$2 code done_before='' restarts=0
  shift 2
  local nodelist
  nodelist=$(IFS=,; echo "$*")
  # With one connection tensor-parallel collectives run beside backward GEMMs; microbatches differ in length.
  local cuda=(env "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    "PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}")
  # shellcheck disable=SC2016  # the variables are those of each rank
  local rank='RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"'
  while :; do
    export MASTER_ADDR=$1
    if [ -n "${T1_DRY_RUN:-}" ]; then
      step "$LOGS/trainer.log" $# "$ranks" "$nodelist" "${cuda[@]}" bash -c "$rank" t1 "$T1_PYTHON" -m megatron_t1 "$what" "${OPTIONS[@]}"
      return
    fi
    MASTER_PORT=$(free_port)
    export MASTER_PORT
    [ -n "$ASKED_TO_STOP" ] && requeue
    T1_TURN=$(date +%s%N) # of this job, the ones before have ended: run_dir is not in use by them
    export T1_TURN
    step "$LOGS/trainer.log" $# "$ranks" "$nodelist" \
      "${cuda[@]}" bash -c "$rank" t1 "$T1_PYTHON" -m megatron_t1 "$what" "${OPTIONS[@]}" &
    TRAINER=$!
    [ -n "$ASKED_TO_STOP" ] && stop_trainer # between the two lines above
    await_trainer
    code=$?
    TRAINER=
    ((code == 0)) && finish
    [ -n "$ASKED_TO_STOP" ] && requeue
    ((code == STOPPED)) && fail "$code" "the trainer was stopped from outside (scancel?); submit again to go on"
    ((code > 128)) || fail "$code" "t1 $what ended (exit code $code): $(last_words "$LOGS/trainer.log")"
    [ "$(steps_done)" = "$done_before" ] || restarts=0
    done_before=$(steps_done)
    ((restarts++ < RESTARTS)) || fail "$code" "the trainer was killed or failed $restarts times without a step between: $(last_words "$LOGS/trainer.log")"
    say "a trainer rank was killed or failed (exit code $code), all go on from the newest checkpoint: $(last_words "$LOGS/trainer.log")"
  done
}

await_trainer() { # its exit code; ends it when no server is left that could come back
  local pid alive
  while kill -0 "$TRAINER" 2>/dev/null; do
    sleep 1 &
    wait $! # unlike sleep alone, this lets USR1 through at once
    alive=0
    for pid in ${KEEPERS[@]+"${KEEPERS[@]}"}; do
      kill -0 "$pid" 2>/dev/null && alive=1
    done
    if ((${#KEEPERS[@]} && !alive)); then
      kill -TERM "$TRAINER"
      wait "$TRAINER"
      fail 1 "all vLLM servers ended: $(last_words "$LOGS/serve_${NODES[-1]}.log")"
    fi
  done
  wait "$TRAINER"
}

finish() {
  end_steps
  say "finished; results in $RUN_DIR"
  exit 0
}

requeue() {
  end_steps
  say "requeued; goes on from the newest checkpoint in $RUN_DIR"
  scontrol requeue "$JOB" || fail $STOPPED "the job can't be requeued; submit it again to go on"
  sleep 60 # Slurm ends this script
  exit $STOPPED
}

end_steps() {
  local pid
  for pid in ${KEEPERS[@]+"${KEEPERS[@]}"}; do
    kill -TERM "$pid" 2>/dev/null
  done
  ((${#KEEPERS[@]})) && wait "${KEEPERS[@]}"
  rm -rf "${REGISTRY:-}"
}

settings() { # NAMES OPTIONS...: what the options make of settings, a word each; of wrong ones `t1 check` tells
  python -c 'import sys
from operator import attrgetter
from megatron_t1.cli.options import parse
from megatron_t1.config import Config
cfg, _ = parse(Config, sys.argv[2:])
print(*("".join(str(attrgetter(name)(cfg or Config())).lower().split()) for name in sys.argv[1].split()))' "$@"
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

steps_done() { tail -qn 1 "$RUN_DIR/rl/metrics.jsonl" "$RUN_DIR/sft/metrics.jsonl" 2>/dev/null | cut -c 1-20; }

last_words() { # LOG: the last line since its last start, after the first of an error of t1; where t1 did not begin, Slurm's
  tail -c 100000 "$1" 2>/dev/null | tr '\r' '\n' | grep . | awk '
    / job [0-9.]+: starts on / { error = last = slurms = ""; next }
    /^(slurmstepd|srun)/ { if (slurms == "" && /error/) slurms = $0; next }
    /^t1 [a-z-]+: error: / { error = $0 }
    { last = $0 }
    END { print substr(last == "" ? slurms : (error == "" || error == last) ? last : error " [...] " last, 1, 500) }'
}
