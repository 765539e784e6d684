"""One microbatch on its way through a chain of devices."""
