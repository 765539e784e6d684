"""The forward path on GPUs: paged attention, graphs, kernels, sampling that nobody waits for."""
