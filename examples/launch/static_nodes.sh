#!/usr/bin/env bash
# Several machines, started by hand on each.
#
#   on node 0:  NODE_RANK=0 MASTER_ADDR=node0 examples/launch/static_nodes.sh CONFIG.yaml [key=value ...]
#   on node 1:  NODE_RANK=1 MASTER_ADDR=node0 examples/launch/static_nodes.sh CONFIG.yaml [key=value ...]
#
# Nothing restarts by itself. When one node ends, all do; start the same commands again, and the run resumes.
# train.output_dir must be on a file system that all nodes share: every process writes its part of a checkpoint.
set -euo pipefail

NNODES=${NNODES:-2}
NODE_RANK=${NODE_RANK:?set it to the number of this machine, from 0 to NNODES - 1}
MASTER_ADDR=${MASTER_ADDR:?set it to the private address of node 0}
MASTER_PORT=${MASTER_PORT:-29500}   # open on node 0
NPROC_PER_NODE=${NPROC_PER_NODE:-8} # processes on each machine: one a GPU
SOCKET_IFNAME=${SOCKET_IFNAME:-}    # the cluster's private network device, such as eth1; empty: by host name
CONFIG=${1:?usage: $0 CONFIG.yaml [key=value ...]}
shift

# What listens on each node is open to whoever reaches it: docs/deployment.md#ports.
if [[ $SOCKET_IFNAME ]]; then export GLOO_SOCKET_IFNAME=$SOCKET_IFNAME NCCL_SOCKET_IFNAME=$SOCKET_IFNAME; fi

exec chord-megatron train "$CONFIG" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$NPROC_PER_NODE" "$@"
