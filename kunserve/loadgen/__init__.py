"""Put load on a server and measure it: workload (what, when) -> client (send and time) -> report, plot.

`command` is the door and `arguments` its flags; `metrics` and `record` watch the server meanwhile.
"""
