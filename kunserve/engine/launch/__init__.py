"""From a configuration to an engine that serves."""
