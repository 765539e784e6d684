"""Several simulated servers behind a router, and an autoscaler that starts more."""
