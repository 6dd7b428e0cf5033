#!/usr/bin/env bash
# A search as a Slurm job, with a Ray cluster of its own on the job's nodes. See README.md.
#   sbatch cluster/slurm.sh jobs/cifar10.py --run-dir /shared/runs/resnet56 ...
# from the repository's root on a shared file system, with its environment activated.
#SBATCH --job-name=fppmo-ray
#SBATCH --output=fppmo-ray-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# --exclusive: when it ends, `ray symmetric-run` stops every Ray process on the node.
# --signal: sent to this script alone, 300 s before the time limit; a score takes less time.
set -euo pipefail

(($#)) || { echo "usage: sbatch cluster/slurm.sh JOB.py [its flags]" >&2; exit 2; }
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# In the home directory, which all nodes see; Ray would create it readable by everyone.
(umask 077 && ray get-auth-token --generate >/dev/null)
chmod 600 ~/.ray/auth_token # also if it existed before
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# This script runs on the first node, and so does the driver, where signals can reach it.
address=$(hostname):6379
driver=$(mktemp)
trap 'rm -f "$driver"' EXIT

stop_driver() { # the driver finishes the running scores, then exits with 143
  if [[ -s $driver ]]; then kill -TERM "$(<"$driver")"; fi
}
requeue=no
trap 'requeue=yes; stop_driver' USR1 # the time limit is near
trap stop_driver TERM                # cancelled or preempted; Slurm itself requeues preempted jobs

# No --min-nodes: the search starts with the first node, and workers join as the others come up.
# GPUs: each node's own, as `ray start` finds them.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  ray symmetric-run --address "$address" --num-cpus="$SLURM_CPUS_PER_TASK" -- \
  bash -c 'echo $$ >"$0"; exec env RAY_ADDRESS="$1" python "${@:2}" --resume-or-start' \
  "$driver" "$address" "$@" &
srun=$!

# A signal's trap interrupts `wait`: wait again until srun has ended.
while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done
wait "$srun" && status=0 || status=$?
if [[ $requeue == yes && $status == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
