"""`python -m traceir`, for launchers such as torchrun."""

import sys

from traceir.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
