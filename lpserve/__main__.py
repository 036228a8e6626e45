"""`python -m lpserve`."""

import sys

from lpserve.cli.entry import main

sys.exit(main())
