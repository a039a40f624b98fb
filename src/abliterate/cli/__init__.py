"""The command line: parse, call, print. Torch is imported only when a command runs."""

from abliterate.cli.app import main

__all__ = ["main"]
