"""How the `config.json` of each family becomes a `ModelConfig`."""
