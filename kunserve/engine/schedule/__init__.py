"""Which tokens of which requests a microbatch has. Pure: no clock, no I/O, no torch."""
