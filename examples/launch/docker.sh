#!/usr/bin/env bash
# One machine, in a container. Run it where relative paths of the recipe lead, such as the root of the repository.
#
#   IMAGE=chord_megatron MODELS=/models examples/launch/docker.sh CONFIG.yaml [key=value ...]
set -euo pipefail

IMAGE=${IMAGE:-chord_megatron}
NAME=${NAME:-chord-train}
GPUS=${GPUS:-all}                   # or "device=0,1"; empty for none
NPROC_PER_NODE=${NPROC_PER_NODE:-8} # processes: one a GPU
MODELS=${MODELS:-}                  # a directory that is mounted read-only under the same path
CONFIG=${1:?usage: $0 CONFIG.yaml [key=value ...]}
shift

options=(
  --rm --init --name "$NAME"
  --user "$(id -u):$(id -g)" # who owns what the run writes
  # /dev/shm: NCCL uses it between the processes of a machine, and weights travel through it to a vLLM server.
  # Docker's default is 64 MB. `--shm-size 64g` instead, where the host's IPC must not be shared.
  --ipc host
  --ulimit memlock=-1 --ulimit stack=67108864
  --volume "$PWD:$PWD" --workdir "$PWD"
  --env PYTHONSAFEPATH=1 # the image's chord_megatron in every process, not one that lies here
  # Names without values: docker takes them from this environment, so that no secret is on a command line.
  --env HF_TOKEN --env CHORD_SERVER_TOKEN
  --env WANDB_API_KEY --env WANDB_MODE --env SWANLAB_API_KEY --env SWANLAB_MODE # of tracking.report_to
  --env MLFLOW_TRACKING_URI --env MLFLOW_TRACKING_TOKEN
)
if [[ $GPUS ]]; then options+=(--gpus "$GPUS"); fi
if [[ $MODELS ]]; then options+=(--volume "$MODELS:$MODELS:ro"); fi

exec docker run "${options[@]}" "$IMAGE" \
  chord-megatron train "$CONFIG" --nproc-per-node "$NPROC_PER_NODE" "$@"
