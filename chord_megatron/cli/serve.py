"""`chord-megatron serve`: the options of a rollout server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelDir = Annotated[Path, typer.Argument(metavar="MODEL", help="directory with config.json and tokenizer")]
VllmArguments = Annotated[
    list[str] | None, typer.Argument(metavar="[-- VLLM_ARGUMENTS]...", help="passed on to vLLM's server")
]


def serve(
    model: ModelDir,
    vllm_arguments: VllmArguments = None,
    host: Annotated[str, typer.Option(help="address to listen on; the default is reached from this machine only")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="the trainer's model.dtype")] = "bfloat16",
    tensor_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    max_model_len: Annotated[
        int, typer.Option(min=2, help="tokens: data.max_prompt_length + rollout.max_completion_length")
    ] = 4096,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="completions drawn at once")] = 256,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.9,
) -> int:
    """Start a vLLM server for rollouts, and keep it running. A trainer sends the weights.

    The environment variable CHORD_SERVER_TOKEN holds the secret that every request has to bring.
    """
    from chord_megatron.rollout.serving.serve import ServerOptions
    from chord_megatron.rollout.serving.serve import serve as run

    return run(
        ServerOptions(
            model_dir=model,
            host=host,
            port=port,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            vllm_arguments=tuple(vllm_arguments or ()),
        )
    )
