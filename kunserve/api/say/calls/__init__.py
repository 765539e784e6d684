"""Tool calls in the ways model families write them, out of a stream of text."""
