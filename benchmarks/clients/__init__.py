"""Many clients of one daemon. `worker` is a process of some of them, `python -m benchmarks.clients` the program."""
