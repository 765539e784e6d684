"""End to end: real bytes, real engines and real server processes against what the server promises."""
