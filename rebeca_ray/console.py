"""The console of the command line. The package itself logs: see log.py."""

from rich.console import Console

console = Console(soft_wrap=True)  # a line stays whole, so that `grep` finds it
