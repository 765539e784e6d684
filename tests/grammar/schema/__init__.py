"""Schemas of structures."""
