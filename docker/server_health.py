"""The health check of docker/Dockerfile.vllm: fails unless vLLM's engine says that it is well."""

import os
import urllib.request

request = urllib.request.Request(
    "http://127.0.0.1:8000/chord/health", headers={"Authorization": f"Bearer {os.environ['CHORD_SERVER_TOKEN']}"}
)
urllib.request.urlopen(request, timeout=8).close()  # raises for every status but 2xx
