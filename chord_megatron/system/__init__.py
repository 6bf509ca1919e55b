"""What the operating system and the installation do for the rest: files, processes, versions."""
