"""Trains every configuration of a JSON list, one after the other in the same processes."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

from megatron.core import parallel_state

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.config import Config
from chord_megatron.training.outputs import RunOutputs
from chord_megatron.training.run import Run


def main(configs: list[Config]) -> None:
    """Train without what would take longer than the steps: checkpoints and plots."""
    with patch.object(Run, "_save"), patch.object(RunOutputs, "finish"):
        layout = configs[0].parallel
        for config in configs:
            if config.parallel != layout:
                layout = config.parallel
                parallel_state.destroy_model_parallel()
            Run(config).train()
    shut_down_distributed()


if __name__ == "__main__":
    main([Config.model_validate(config) for config in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))])
