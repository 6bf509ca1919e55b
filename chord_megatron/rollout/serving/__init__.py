"""The server's side of rollout servers: the command, the guard of its routes, vLLM and its workers."""
