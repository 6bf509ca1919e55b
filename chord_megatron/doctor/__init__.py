"""`chord-megatron doctor`: what this machine has, what replaces what it lacks, and whether a run would work here."""
