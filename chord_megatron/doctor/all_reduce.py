"""An all-reduce of two processes on this machine, as a run with several processes starts with one."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from chord_megatron.doctor.check import last_words
from chord_megatron.system.listening import listen_at, listen_on_loopback

_HOST = "127.0.0.1"
_REPETITIONS = 20


def time_all_reduce(backend: str, timeout_seconds: float) -> float:
    """Seconds of an all-reduce of one number by two processes. Raises RuntimeError with what went wrong."""
    listener = listen_at(_HOST, 0)  # 0: a free port
    assert listener is not None, f"this machine has no {_HOST}"
    port = listener.getsockname()[1]
    # Kept here while they meet. By itself it would listen on every interface.
    store = dist.TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    command = [sys.executable, "-m", __name__, backend, str(store.port), str(timeout_seconds)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    deadline = time.monotonic() + timeout_seconds
    try:
        outputs = [p.communicate(timeout=max(0.0, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the processes did not meet within {timeout_seconds:g} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors = [last_words(p.returncode, stderr) for p, (_, stderr) in zip(processes, outputs) if p.returncode]
    if errors:
        raise RuntimeError("; ".join(dict.fromkeys(errors)))
    return max(float(stdout.split()[-1]) for stdout, _ in outputs)


def _main(backend: str, port: str, timeout_seconds: str, rank: str) -> None:
    """One of the two processes; prints the seconds."""
    listen_on_loopback(nccl=True)
    # Below the parent's limit, so that the one that waits in vain can say so.
    timeout = timedelta(seconds=0.7 * float(timeout_seconds))
    store = dist.TCPStore(_HOST, int(port), is_master=False, timeout=timeout)
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=int(rank), world_size=2, timeout=timeout)
    number = torch.tensor([1.0 + int(rank)], device=device)
    dist.all_reduce(number)
    if number.item() != 3.0:
        raise RuntimeError(f"the all-reduce of 1 and 2 gave {number.item()}")
    start = time.perf_counter()
    for _ in range(_REPETITIONS):
        dist.all_reduce(number)
    number.item()  # waits for a GPU
    print((time.perf_counter() - start) / _REPETITIONS)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
