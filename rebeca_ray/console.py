"""The console of the command line."""

from rich.console import Console

console = Console(soft_wrap=True)  # a log is searched line by line
