"""From data sets to token sequences: sources, prompts, expert answers, resumable cursors, packing."""
