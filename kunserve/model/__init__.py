"""A model's files: where they come from, what they say, their tensors. Nothing here computes."""
