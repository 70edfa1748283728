#!/usr/bin/env bash
# Training on GKE through xpk: the image, then the workload. The cluster is there already (docs/launch.md).
#
#     export PROJECT=my-project ZONE=us-west4-a CLUSTER=muse IMAGE=us-docker.pkg.dev/my-project/muse/muse:1
#     export TPU_TYPE=v5litepod-256 STORAGE=shared
#     tools/launch/gke.sh image
#     tools/launch/gke.sh train base-1 --config=configs/paper/base_632m.py --workdir=/shared/runs/base
#
# STORAGE is a shared disk known to xpk, mounted where --workdir and the data are. DRY_RUN=1 prints the commands and
# runs none.

set -euo pipefail
: "${IMAGE:?name the image, e.g. us-docker.pkg.dev/PROJECT/REPOSITORY/muse:1}"

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

case "${1:-}" in
  image)
    run docker build --file=tools/launch/Dockerfile --build-arg="EXTRA=${EXTRA:-tpu}" --tag="$IMAGE" .
    run docker push "$IMAGE"
    ;;
  train)
    : "${2:?name the workload}"
    # 143 (SIGTERM, saved) is among the codes that xpk restarts by itself; 75 is a host that another one lost.
    run xpk workload create --workload="$2" --cluster="${CLUSTER:?}" --project="${PROJECT:?}" --zone="${ZONE:?}" \
      --tpu-type="${TPU_TYPE:?e.g. v5litepod-256}" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
      --storage="${STORAGE:?name a shared disk of xpk storage list}" \
      --restart-on-exit-codes=75 --max-restarts=100 --termination-grace-period-seconds=120 \
      --command="python train.py --distributed $(printf '%q ' "${@:3}")"
    ;;
  *)
    echo "usage: $0 image | train NAME FLAGS" >&2
    exit 2
    ;;
esac
