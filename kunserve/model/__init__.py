"""The decoder, its operations and the loading of checkpoints."""
