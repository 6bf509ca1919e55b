"""The trainer's side of rollout servers: clients, the pool, sending weights."""
