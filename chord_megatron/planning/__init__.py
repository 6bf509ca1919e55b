"""What a run will do, from its configuration alone: rules across keys, batch arithmetic, memory. Loads nothing."""
