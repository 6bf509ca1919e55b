#!/usr/bin/env bash
# Several machines, of which any may fail and come back: torchrun's c10d rendezvous.
#
#   on node 0:  NODE_RANK=0 RDZV_ENDPOINT=node0:29500 examples/launch/elastic_nodes.sh CONFIG.yaml [key=value ...]
#   on node 1:  NODE_RANK=1 RDZV_ENDPOINT=node0:29500 examples/launch/elastic_nodes.sh CONFIG.yaml [key=value ...]
#
# Slurm and Kubernetes run this same script on each node. A node that was lost is started again with the same command;
# the others wait for it, and all go on from the latest checkpoint. docs/deployment.md says what happens when.
# train.output_dir must be on a file system that all nodes share: every process writes its part of a checkpoint.
set -euo pipefail

NNODES=${NNODES:-2}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
NODE_RANK=${NODE_RANK:?set it to the number of this machine, from 0 to NNODES - 1}
RDZV_ENDPOINT=${RDZV_ENDPOINT:?set it to HOST:PORT of node 0, which keeps the rendezvous}
RDZV_ID=${RDZV_ID:-chord}           # the same on all nodes, another one for each run that shares the endpoint
NPROC_PER_NODE=${NPROC_PER_NODE:-8} # processes on each machine: one a GPU
MAX_RESTARTS=${MAX_RESTARTS:-3}     # of the processes, by a torchrun that lives
ATTEMPTS=${ATTEMPTS:-3}             # of torchrun itself
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}   # seconds to wait for the other nodes
LOCAL_ADDR=${LOCAL_ADDR:-}          # where the other nodes reach this one, if its host name does not resolve there
SOCKET_IFNAME=${SOCKET_IFNAME:-}    # the cluster's private network device, such as eth1; empty: by host name
STOP_TIMEOUT=${STOP_TIMEOUT:-30}    # seconds from a signal to SIGKILL: with train.save_on_signal a step and a checkpoint
CONFIG=${1:?usage: $0 CONFIG.yaml [key=value ...]}
shift

# What listens on each node is open to whoever reaches it: docs/deployment.md#ports.
if [[ $SOCKET_IFNAME ]]; then export GLOO_SOCKET_IFNAME=$SOCKET_IFNAME NCCL_SOCKET_IFNAME=$SOCKET_IFNAME; fi

# The store of the rendezvous, which listens at RDZV_ENDPOINT; torchrun's own would listen on all interfaces.
agent_command=(torchrun)
if [[ $NODE_RANK == 0 ]]; then agent_command=(python "$(dirname "$0")/elastic_agent.py" "$RDZV_ENDPOINT"); fi

# torchrun keeps the address of the store at which its first round of processes met. A node that joins a later round waits
# for an address that nobody publishes any more (dynamic_rendezvous.py of torch 2.13; see pytorch/pytorch#135712). With
# this setting the processes of each round make a store of their own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$STOP_TIMEOUT

torchrun=(
  "${agent_command[@]}"
  --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS"
  --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID"
  --rdzv-conf "is_host=false,join_timeout=$JOIN_TIMEOUT,read_timeout=$JOIN_TIMEOUT"
)
if [[ $LOCAL_ADDR ]]; then torchrun+=(--local-addr "$LOCAL_ADDR"); fi

# bash ends at a signal without a word to its children, and torchrun's processes would train on.
agent=
stopping=
trap 'stopping=143; if [[ $agent ]]; then kill -TERM "$agent" 2>/dev/null || true; fi' TERM
trap 'stopping=130; if [[ $agent ]]; then kill -TERM "$agent" 2>/dev/null || true; fi' INT

# A mistake in the configuration would otherwise be tried again and again.
chord-megatron validate "$CONFIG" --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "$@"

# When node 0 is lost the rendezvous is lost with it, and torchrun ends on every node: start it again, and wait there.
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  if [[ $stopping ]]; then exit "$stopping"; fi # 128 + the signal's number
  echo "$0: node $NODE_RANK of $NNODES meets the others at $RDZV_ENDPOINT, for whom it waits $JOIN_TIMEOUT s"
  "${torchrun[@]}" -m chord_megatron.train "$CONFIG" "$@" &
  agent=$!
  code=0
  wait "$agent" || code=$?
  while kill -0 "$agent" 2>/dev/null; do # a signal ended the wait, not torchrun
    code=0
    wait "$agent" || code=$?
  done
  if ((code == 0)); then exit 0; fi
  if [[ $stopping ]]; then exit "$stopping"; fi
  echo "$0: torchrun ended with $code (attempt $attempt of $ATTEMPTS)" >&2
  agent=
  sleep 5
done
exit "$code"
