# What the job scripts here share. Sourced; then: train METHOD CONFIG [ARGUMENT ...]
# One launcher a node, through srun. On USR1 (time limit, preemption, scancel --signal) the ranks save and leave, and the job is queued again.

cd "$SLURM_SUBMIT_DIR" || exit 2                      # sbatch is typed in the repository's root
[ -d .venv/bin ] && export PATH="$PWD/.venv/bin:$PATH"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not inherit it from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# NCCL. The defaults are right on most clusters; look here first where ranks hang or are slow:
# export NCCL_SOCKET_IFNAME=ib0      # the interface that nodes reach each other by
# export NCCL_IB_HCA=mlx5            # which InfiniBand adapters
# export NCCL_DEBUG=INFO             # what it chose, in each rank's log
# export TORCH_NCCL_ASYNC_ERROR_HANDLING=1   # one rank's failure ends the others (torch's default)

say() { echo "[$(date +%T) job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}] $*"; }

processes() { # a node: its GPUs, or PROCESSES_PER_NODE where there are none
  local gpus=0
  command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
  [ "$gpus" -gt 0 ] && echo "$gpus" || echo "${PROCESSES_PER_NODE:-1}"
}

check() { # every node has the package, the data and the teacher, or is named
  srun --ntasks-per-node=1 bash -c '
    fail() { echo "node $SLURMD_NODENAME: $*" >&2; exit 2; }
    command -v accelerate >/dev/null || fail "accelerate is not on PATH: run make install on a file system that this node sees"
    said=$(python -m "trainers.$0" "$@" --check 2>&1) || fail "$(tail -n 1 <<<"$said")"' "$@"
}

train() {
  local method=$1 config=$2; shift 2
  local marker=$PWD/runs/.stopped-$SLURM_JOB_ID each total rc pid
  mkdir -p runs
  rm -f "$marker"
  say "checking $SLURM_NNODES nodes: $SLURM_JOB_NODELIST"
  check "$method" --config "$config" "$@" || exit 2
  each=$(processes) total=$((SLURM_NNODES * $(processes)))
  export HEAD_NODE PORT LAUNCH
  HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  PORT=$((20000 + SLURM_JOB_ID % 10000))              # not a fixed one: jobs may share a node
  LAUNCH="--num_machines $SLURM_NNODES --num_processes $total --main_process_ip $HEAD_NODE --main_process_port $PORT --mixed_precision no --dynamo_backend no"
  [ "$total" -gt 1 ] && LAUNCH="--multi_gpu $LAUNCH"  # the configuration is the trainer's own: --config
  say "$total processes, $each a node, meeting at $HEAD_NODE:$PORT"
  # SIG_IGN is inherited: the launcher outlives USR1, the ranks install a handler of their own.
  srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash -c 'trap "" USR1; exec accelerate launch $LAUNCH --machine_rank "$SLURM_NODEID" "$@"' \
    launcher "trainers/$method.py" --config "$config" --loop.stopped "$marker" "$@" &
  pid=$!
  trap 'say "USR1: the ranks save and leave"; kill -USR1 "$pid"' USR1
  while :; do wait "$pid"; rc=$?; kill -0 "$pid" 2>/dev/null || break; done   # wait returns early when the trap has run
  say "ended with $rc"
  if [ -e "$marker" ]; then
    rm -f "$marker"
    say "queued again"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60                                          # until Slurm ends this run of the script
  fi
  exit "$rc"
}
