"""Pure functions that decide when and how weights are dropped and restored."""
