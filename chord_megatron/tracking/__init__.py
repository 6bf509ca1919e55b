"""What a run leaves behind: metrics, completions, the progress line and the report."""
