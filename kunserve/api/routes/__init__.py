"""The endpoints that clients know."""
