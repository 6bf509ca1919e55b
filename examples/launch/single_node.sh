#!/usr/bin/env bash
# One machine.
#
#   examples/launch/single_node.sh CONFIG.yaml [key=value ...]
#
# Its processes listen at 127.0.0.1 alone. Run it again after an interruption: it resumes from the latest checkpoint.
set -euo pipefail

NPROC_PER_NODE=${NPROC_PER_NODE:-8} # processes: one a GPU
CONFIG=${1:?usage: $0 CONFIG.yaml [key=value ...]}
shift

exec chord-megatron train "$CONFIG" --nproc-per-node "$NPROC_PER_NODE" "$@"
