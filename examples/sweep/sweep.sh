#!/usr/bin/env bash
# One run for each combination of settings, one after another, each in a folder of its own; at the end they are compared.
# Started again it resumes where it stopped: runs that are finished say so and end at once.
#
#   examples/sweep/sweep.sh CONFIG.yaml [key=value ...]
#
# LAUNCH is what starts a run: on a cluster any of examples/launch, such as `sbatch --wait examples/launch/slurm.sbatch`.
set -euo pipefail

LAUNCH=${LAUNCH:-chord-megatron train}
RUNS=${RUNS:-runs/sweep}
LRS=${LRS:-5e-7 1e-6 2e-6}
SEEDS=${SEEDS:-0 1 2}

read -ra launch <<<"$LAUNCH"
config=${1:?CONFIG.yaml}
shift
runs=()
for lr in $LRS; do
  for seed in $SEEDS; do
    run=$RUNS/lr_$lr/seed_$seed
    "${launch[@]}" "$config" "$@" "optimizer.lr=$lr" "train.seed=$seed" "train.output_dir=$run"
    runs+=("$run")
  done
done
chord-megatron compare "${runs[@]}"
