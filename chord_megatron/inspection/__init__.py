"""Data looked at before a run: what the model reads and learns, what is left out, and a first recipe for a data file."""
