#!/usr/bin/env bash
# A Cloud TPU slice: make it, bring this checkout to every host, train, look at the log, delete it.
#
#     export TPU_NAME=muse ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#     tools/launch/tpu_pod.sh create
#     tools/launch/tpu_pod.sh setup          # again after a change of the code
#     tools/launch/tpu_pod.sh train --config=configs/paper/base_632m.py --workdir=/shared/runs/base
#     tools/launch/tpu_pod.sh log
#     tools/launch/tpu_pod.sh delete
#
# DRY_RUN=1 prints the commands and runs none. `train` again goes on from the newest checkpoint.

set -euo pipefail
: "${TPU_NAME:?name the slice}" "${ZONE:?name the zone}"

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() { run gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$ZONE" "${@:2}"; }

all_hosts() { tpu ssh --worker=all --command="$1"; }

case "${1:-}" in
  create)
    tpu create --accelerator-type="${ACCELERATOR:?e.g. v5litepod-256}" --version="${RUNTIME:?e.g. v2-alpha-tpuv5-lite}"
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    run git archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:muse.tar.gz" --zone="$ZONE" --worker=all
    rm -f "$archive"
    all_hosts 'mkdir -p muse && tar -xzf muse.tar.gz -C muse'
    all_hosts 'cd muse && python3 -m venv .venv && .venv/bin/pip install -q -e .[tpu,data]'
    ;;
  train)
    # Detached, so that a lost connection stops nothing; every host writes its own log.
    all_hosts "cd muse && nohup .venv/bin/python train.py --distributed $(printf '%q ' "${@:2}")>>train.log 2>&1 </dev/null &"
    ;;
  log)
    tpu ssh --worker=0 --command='tail -n 50 -f muse/train.log'
    ;;
  stop)
    # SIGTERM: the run saves after the current step and ends with 143.
    all_hosts 'pkill -TERM -f "train.py --distributed"'
    ;;
  delete)
    tpu delete --quiet
    ;;
  *)
    echo "usage: $0 create | setup | train FLAGS | log | stop | delete" >&2
    exit 2
    ;;
esac
