"""Blocks of KV: where they are, and which ids of a device are free. Know nothing of requests and groups."""
