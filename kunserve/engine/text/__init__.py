"""Texts of requests: tokens to text and back, stop strings, grammars, the stream to the client."""
