"""Version ranges that are checked at run time."""

VLLM_RANGE = ">=0.32,<0.33"
