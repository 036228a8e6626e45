"""The command line: flags to the API."""

from lpserve.cli.entry import main as main
