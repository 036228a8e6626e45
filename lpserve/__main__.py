"""`python -m lpserve`."""

import sys

from lpserve.cli import main

sys.exit(main())
