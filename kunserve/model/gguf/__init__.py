"""GGUF files, served as they are: what they hold, as which model, with which tokenizer."""
