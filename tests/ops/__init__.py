"""A small production on this machine: all servers real, three nights, a fault in each."""
