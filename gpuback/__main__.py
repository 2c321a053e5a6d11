"""`python -m gpuback` is the command `gpuback`."""

import sys

from gpuback._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
