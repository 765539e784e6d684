"""Two kinds of KV: where some layers have a window and others see all, blocks of the former are let go behind it."""
