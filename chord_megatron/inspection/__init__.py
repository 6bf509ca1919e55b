"""Data looked at before a run: what the model reads and learns, what is left out; a first recipe for a data file."""
