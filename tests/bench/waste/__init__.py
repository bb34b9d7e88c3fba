"""Arms of `tests/bench/pipeline.py`: each measures one way to do some work, in a process of its own."""
