"""torchrun on the node that keeps the rendezvous, which listens at the endpoint's address alone.

torchrun's own store listens on all interfaces, and no option of it names an address (c10d_rendezvous_backend.py of
torch 2.13, `_create_tcp_store`). So this process keeps the store, and its torchrun joins it as those of other nodes do
(`--rdzv-conf is_host=false`): the store ends with the agent, as torchrun's own would.

    python elastic_agent.py HOST:PORT [torchrun's arguments]
"""

from __future__ import annotations

import sys

from torch.distributed import TCPStore
from torch.distributed.run import main

from chord_megatron.system.errors import UserError
from chord_megatron.system.listening import listen_at

if __name__ == "__main__":
    host, _, port = sys.argv[1].rpartition(":")
    host = host.strip("[]")  # of an IPv6 address
    try:
        # None, and all interfaces: HOST is a name by which only this machine knows itself, or an address of another.
        listener = listen_at(host, int(port))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    place = listener.detach() if listener else None
    store = TCPStore(host, int(port), is_master=True, wait_for_workers=False, master_listen_fd=place)
    main(sys.argv[2:])
