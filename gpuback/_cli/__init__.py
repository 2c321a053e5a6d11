"""What the command line does once `gpuback.cli` has started it. Needs the extra "cli"."""
