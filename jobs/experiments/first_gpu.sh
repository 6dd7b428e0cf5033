#!/usr/bin/env bash
# The first 25 minutes on one GPU, in three steps of less than ten minutes each. Every step goes on
# from what an earlier run of it left, so repeat a step that says that it is not finished.
#
#   jobs/experiments/first_gpu.sh check DATA OUT      tests that need a GPU, then gpu_check.py
#   jobs/experiments/first_gpu.sh baselines DATA OUT  ResNet-56 and ResNet-110, side by side
#   jobs/experiments/first_gpu.sh searches DATA OUT   search and fine-tuning of both, side by side
#
# DATA: CIFAR-10 as parquet files. OUT: a folder that stays.
# For a rehearsal on CPUs: GPUS=0 EPOCHS=1 PROPOSALS=16 NETWORKS=resnet20. PRINT=1 prints the
# commands instead of running them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
usage="usage: $0 check|baselines|searches DATA OUT"
step=${1:?$usage} data=${2:?$usage} out=${3:?$usage}
python=${PYTHON:-python3}
limit=${LIMIT:-560}  # seconds of a step
epochs=${EPOCHS:-40}
proposals=${PROPOSALS:-320}
read -ra networks <<<"${NETWORKS:-resnet56 resnet110}"
begin=$SECONDS

run() {  # run NAME COMMAND...: log to OUT/NAME.log; stop it by SIGTERM at the end of the step
  local name=$1
  shift
  if [[ -n ${PRINT:-} ]]; then
    echo "$*"
    return
  fi
  local left=$((limit - SECONDS + begin)) status=0
  timeout --kill-after=20 "$((left > 1 ? left : 1))" "$@" >>"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) echo "$name: done" ;;
    124 | 137 | 143) echo "$name: not finished, repeat the step" ;;
    *) echo "$name: failed with status $status, see $out/$name.log" ;;
  esac
  tail -n 3 "$out/$name.log" | sed "s/^/  /"
  return $status
}

together() {  # together FUNCTION: call it for every network side by side
  local pids=() status=0
  for network in "${networks[@]}"; do
    "$1" "$network" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return $status
}

share=$($python -c "print(${GPUS:-1} / ${#networks[@]})")
baseline() {
  local flags=(--gpus-per-worker "$share" --dtype bfloat16 --cuda-graphs)
  [[ ${GPUS:-1} != 0 ]] || flags=()
  run "baseline-$1" "$python" jobs/baseline.py --data "$data" --network "$1" --learning-rate 0.1 \
    --fine-tune-epochs "$epochs" "${flags[@]}" --output "$out/baseline-$1"
}
pruned() {
  local flags=(--gpus-per-worker "$($python -c "print($share / 2)")" --autotune)
  [[ ${GPUS:-1} != 0 ]] || flags=()
  run "search-$1" "$python" jobs/cifar10.py --data "$data" --network "$1" \
    --weights "$out/baseline-$1/weights.pt" \
    --search-val-rows "$out/baseline-$1/search_val_rows.npy" --macs-cut 0.57 \
    --proposals "$proposals" --workers 2 "${flags[@]}" --fine-tune-epochs "$epochs" \
    --run-dir "$out/search-$1" --resume-or-start
}

mkdir -p "$out"
case $step in
  check)
    check=("$python" jobs/experiments/gpu_check.py --output "$out/gpu_check.json")
    if [[ ${GPUS:-1} == 0 ]]; then
      run gpu-check "${check[@]}" --dry
      exit
    fi
    tests=0
    run gpu-tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests || tests=$?
    run gpu-check "${check[@]}"
    exit $tests
    ;;
  baselines) together baseline ;;
  searches) together pruned ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
