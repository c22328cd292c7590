"""`python -m balloon` is the program `balloon`."""

import sys

from balloon.cli import main

if __name__ == "__main__":
    sys.exit(main())
