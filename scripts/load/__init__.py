"""Load generator: workload (what, when) -> client (send and time) -> report, plot. ../loadgen.py is the door."""
