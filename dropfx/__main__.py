"""`python -m dropfx`."""

import sys

from dropfx.cli import main

sys.exit(main())
