"""`python -m chord_megatron.rollout.serving.vllm_server ARGUMENTS`: vLLM's API server, of a supported version.

Started and restarted by serve.py, which says what the arguments are. Two processes: the first is there to end the
server and the engine's processes, which would keep the memory of the GPUs, when serve.py's is killed.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from chord_megatron.system.errors import UserError
from chord_megatron.system.processes import LAUNCHER, end_with_parent, guard
from chord_megatron.system.quiet import end_without_leak_lists, silence_vllm

silence_vllm()  # here, because processes that multiprocessing spawns read this file before anything of vLLM's


def main() -> int:
    """Serve until ended; returns the exit code, 2 for what the user can mend."""
    server = os.fork()  # before what takes long to import, and starts threads
    if server:
        guard(server, parent=int(os.environ[LAUNCHER]), passes_on_sigterm=True)
    end_with_parent()
    from chord_megatron.rollout.vllm_adapter import import_vllm

    try:
        import_vllm()
        from chord_megatron.rollout.serving.connections import bound_connections  # uvicorn comes with vLLM
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bound_connections()
    # `vllm serve` finds its own distribution by name, which has another one on CPU.
    import_module("vllm.entrypoints.launchers.api_server.entry").main()
    end_without_leak_lists(0)


if __name__ == "__main__":
    sys.exit(main())
