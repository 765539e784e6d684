"""Two kinds of KV: how the memory that is there is divided between them."""
