"""`python vllm_requirements.py VERSION`: what that vLLM needs beside a torch, and what compiles it, a line each.

Left out are torch and the packages that are built for one torch: vLLM's wheels pin them to the torch of another index.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

BUILT_FOR_ONE_TORCH = {"torch", "torchaudio", "torchvision", "torchcodec"}
# What pip would fetch for the build by itself, had the build a torch of its own (vLLM's requirements/build/cuda.txt).
FOR_THE_BUILD = (
    "cmake>=3.26.1",
    "ninja",
    "packaging>=24.2",
    "setuptools-scm>=8",
    "setuptools-rust>=1.9",
    "wheel",
    "jinja2",
)


def requirements(version: str) -> list[str]:
    """From the metadata of vLLM's wheel, which pip reads without installing it."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    done = subprocess.run(
        [*command, "--report", "-", f"vllm=={version}"], stdout=subprocess.PIPE, text=True, check=True
    )
    (wheel,) = json.loads(done.stdout)["install"]
    declared = [line for line in wheel["metadata"]["requires_dist"] if "extra ==" not in line]
    return [*FOR_THE_BUILD, *(line for line in declared if name_of(line) not in BUILT_FOR_ONE_TORCH)]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
