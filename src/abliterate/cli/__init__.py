"""The command line: parse, call, show. Torch is imported only when a command runs."""

import gc

gc.disable()  # while modules load nothing is there to be collected, and looking for it is a tenth of `--help`
try:
    from abliterate.cli.app import main
finally:
    gc.enable()

__all__ = ["main"]
