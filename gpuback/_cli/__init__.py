"""What the command line does once `gpuback._cli.main` has started it. Needs the extra "cli"."""
