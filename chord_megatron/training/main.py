"""One process of a run: its arguments, its exit code, and what it says where it fails."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.backend.importing import silence_cuda_advice
from chord_megatron.config import Config, load_config
from chord_megatron.system.errors import UserError
from chord_megatron.system.processes import end_with_parent, is_loopback, listen_on_loopback
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.training.run import Run

_SECONDS_FOR_RANK_0 = 60


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code, 2 for what the user can mend."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print("usage: python -m chord_megatron.train CONFIG.yaml [key=value ...]", file=sys.stderr)
        return 2
    _end_with_launcher()
    silence_cuda_advice()
    try:
        config = load_config(arguments[0], arguments[1:])
        if RunDir(Path(config.train.output_dir)).is_finished(config.train.train_iters):
            if os.environ.get("RANK", "0") == "0":
                print(f"{config.train.output_dir} is finished; raise train.train_iters to train on", flush=True)
            return 0
        _stay_on_this_machine(config)
        Run(config).train()
    except UserError as error:
        if _is_first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave_others(2)
        return 2
    except Exception:
        traceback.print_exc()
        _leave_others(1)
        raise
    finally:
        shut_down_distributed()
    return 0


def _end_with_launcher() -> None:
    """Under torchrun, end when it is killed: orphans would train on, into a resumed run's files."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def _stay_on_this_machine(config: Config) -> None:
    """Listen to nobody else where all processes are here; NCCL must still reach servers elsewhere."""
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        rollout = config.rollout
        listen_on_loopback(nccl=rollout.weight_transfer != "broadcast" or is_loopback(rollout.weight_transfer_address))


def _leave_others(exit_code: int) -> None:
    """End now where there are other ranks: they wait in a collective until torchrun sees this one gone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stderr.flush()
        os._exit(exit_code)


def _is_first_to_fail() -> bool:
    """Whether this process is the first of the job to report an error, so that it is reported once."""
    if not dist.is_initialized():
        if int(os.environ.get("RANK", 0)) > 0:
            # Rank 0 meets the same error and reports it, upon which torchrun ends this process: unless the
            # mistake is this machine's alone. Leaving earlier would have torchrun end rank 0 unheard.
            time.sleep(_SECONDS_FOR_RANK_0)
        return True
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - has no public name
    return store.add("chord_megatron/errors", 1) == 1
