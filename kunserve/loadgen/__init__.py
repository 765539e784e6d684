"""Load generator: workload (what, when) -> client (send and time) -> report, plot. command.py is the door."""
