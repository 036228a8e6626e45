"""`python -m lpserve`."""

from lpserve.cli.entry import script

script()
