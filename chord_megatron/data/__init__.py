"""Rows of files and data sets: prompts, expert answers, tokens, and the order in which they come."""
