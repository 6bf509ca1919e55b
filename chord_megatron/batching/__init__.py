"""Samples to micro-batches, and who gets which rows. Pure."""
