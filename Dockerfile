# Training on NVIDIA GPUs: NVIDIA's PyTorch container, whose torch, TransformerEngine and NCCL stay as they are.
#   docker build --tag chord_megatron .
# Rollouts by vLLM: servers from docker/Dockerfile.vllm, the default (docs/deployment.md). In the trainer's processes:
#   docker build --target colocate --tag chord_megatron:colocate .
# 26.06: Python 3.12, a torch 2.13, which the tests ran with and vLLM 0.32 asks for, TransformerEngine 2.16. It is what
# Megatron-LM's own image of 0.19 starts from. Sources, and other pairs: docs/status.md.
ARG PYTORCH=nvcr.io/nvidia/pytorch:26.06-py3

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY chord_megatron chord_megatron
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir dist .

FROM ${PYTORCH} AS base
# Any user may be given with --user; HOME and USER are then still there (torch and Triton want them for their caches).
RUN useradd --uid 10001 --create-home chord && chmod 1777 /home/chord
ENV HOME=/home/chord USER=chord
WORKDIR /home/chord
# PIP_CONSTRAINT, which the container sets, holds here as well: a dependency that does not fit ends the build.
COPY pyproject.toml constraints.txt docker/requirements.py docker/same_torch.py docker/te_range.py ./
RUN python same_torch.py record torch.json \
    && python requirements.py > requirements.txt \
    && python -m pip install --no-cache-dir --requirement requirements.txt \
    && python te_range.py && python same_torch.py check torch.json
COPY --from=wheel /build/dist dist
RUN python -m pip install --no-cache-dir --no-deps dist/*.whl && python same_torch.py check torch.json
COPY examples examples

# An option, built with --target colocate. vLLM's wheels ask for a torch of their own, so it is compiled against the one
# here: long, with sources from GitHub; each of MAX_JOBS compilers takes some GB of memory. Its other dependencies are
# installed without those that bring a torch.
FROM base AS colocate
ARG VLLM=0.32.0
ARG MAX_JOBS=8
COPY docker/vllm_requirements.py ./
RUN python vllm_requirements.py "$VLLM" > vllm-requirements.txt \
    && python -m pip install --no-cache-dir --requirement vllm-requirements.txt \
    && python same_torch.py check torch.json
RUN MAX_JOBS="$MAX_JOBS" python -m pip install --no-cache-dir --no-deps --no-build-isolation \
        --no-binary vllm "vllm==$VLLM" \
    && python same_torch.py check torch.json
USER 10001
HEALTHCHECK --start-period=5m --interval=1h --timeout=3m CMD ["env", "CUDA_VISIBLE_DEVICES=", "chord-megatron", "doctor"]
CMD ["bash"]

FROM base AS train
USER 10001
# Without GPUs, so that it never takes memory from a run.
HEALTHCHECK --start-period=5m --interval=1h --timeout=3m CMD ["env", "CUDA_VISIBLE_DEVICES=", "chord-megatron", "doctor"]
CMD ["bash"]
