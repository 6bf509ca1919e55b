"""Where a run's numbers go beside its own files: one file for each tracker, all with the methods of protocol.py."""
