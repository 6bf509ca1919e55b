"""A run from start to finish: set-up and loop, a step of the algorithm, the rollout stream, outputs, export."""
