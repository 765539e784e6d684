"""Devices and their physical memory: chunks, ranges, weights, KV."""
