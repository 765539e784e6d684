"""Devices and their physical memory: chunks, ranges, weights, KV. CPU devices are devices like others."""
