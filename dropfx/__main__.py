"""`python -m dropfx`."""

import sys

from dropfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
