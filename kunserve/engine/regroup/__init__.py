"""Transitions: when to drop and restore, weights and KV that change their device."""
