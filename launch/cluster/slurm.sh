#!/usr/bin/env bash
# Submits a training to SLURM: a job that saves before its time is up and queues itself again. `slurm.sh --help` says how.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=launch/cluster/common.sh
source "$root/launch/cluster/common.sh"

usage() {
    cat <<'TEXT'
slurm.sh --workdir=FOLDER [FLAGS] -- FLAGS OF launch/train.py

  --workdir        the run's folder, absolute, on a file system that all nodes share
  --nodes          (1)
  --gpus_per_node  (8) one process each
  --time           longest time of one job (24:00:00)
  --warning_s      so many seconds before, the run is asked to save, and the job queues itself again (300)
  --max_requeues   a run that stalls again and again is given up after so many requeues (20)
  --partition, --account, --qos, --cpus_per_gpu, --mem, --job_name
  --sbatch         one further option of sbatch, such as --sbatch=--constraint=h100
  --python         of an environment with qwenla_jax[cuda] (.venv/bin/python of this checkout)
  --dry_run        print the commands, run none
TEXT
}

defaults=(
    [workdir]="" [nodes]=1 [gpus_per_node]=8 [time]=24:00:00 [warning_s]=300 [max_requeues]=20 [partition]=""
    [account]="" [qos]="" [cpus_per_gpu]="" [mem]="" [job_name]=qwenla_jax [sbatch]=""
    [python]="$root/.venv/bin/python"
)
switches=([dry_run]=1)

parse_flags "$@"
need workdir
# SLURM replaces %j and the like in the log's name, and takes a backslash for a sign of its own.
[[ "${flag[workdir]}" == /?* && "${flag[workdir]}" != *[%\\]* ]] ||
    fail "--workdir: got '${flag[workdir]}', expected an absolute path without a % or a backslash in it"
plain sbatch '^--[a-z]' 'an option, such as --constraint=h100'
number nodes 1
number gpus_per_node 1
number warning_s 1
number max_requeues 0
[[ "${flag[time]}" =~ ^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$ ]] ||
    fail "--time: got '${flag[time]}', expected SLURM's form, such as 24:00:00 or 2-00:00:00"
check_trainer
[[ "${flag[dry_run]}" == true || -x "${flag[python]}" ]] ||
    fail "--python: there is no program ${flag[python]}; make it: python3 -m venv .venv && .venv/bin/pip install '.[cuda]'"

# One process a GPU: that is what jax.distributed.initialize() finds out from SLURM's variables by itself (it gives every
# process the GPU of its local number). So the GPUs are asked for by node and not by task, which would hide the others
# and number each process's own one 0.
options=(
    --job-name="${flag[job_name]}" --nodes="${flag[nodes]}" --ntasks-per-node="${flag[gpus_per_node]}"
    --gpus-per-node="${flag[gpus_per_node]}" --time="${flag[time]}" --signal="B:USR1@${flag[warning_s]}" --requeue
    --open-mode=append --output="${flag[workdir]}/slurm-%j.log" --chdir="$root"
)
for key in partition account qos mem; do
    if [[ -n "${flag[$key]}" ]]; then options+=("--$key=${flag[$key]}"); fi
done
if [[ -n "${flag[cpus_per_gpu]}" ]]; then
    number cpus_per_gpu 1
    options+=(--cpus-per-task="${flag[cpus_per_gpu]}")
fi
if [[ -n "${flag[sbatch]}" ]]; then options+=("${flag[sbatch]}"); fi
command=("${flag[python]}" launch/train.py)
if ((flag[nodes] * flag[gpus_per_node] > 1)); then command+=(--distributed); fi
command+=(--workdir="${flag[workdir]}" "${trainer[@]}")

execute mkdir -p "${flag[workdir]}"
execute sbatch "${options[@]}" "$root/launch/cluster/slurm.sbatch" "${flag[workdir]}" "${flag[max_requeues]}" "${command[@]}"
remark "in the job, on every node and GPU:"
remark "$(show "${command[@]}")"
