"""The command line, which `gpuback._cli.main` starts; needs the extra "cli". The exit codes of its commands."""

FAILED = 1
"""A check failed, or training diverged."""

USAGE = 2
"""Bad usage or input."""

INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13
"""As shells report a process that SIGINT or SIGPIPE has ended."""
