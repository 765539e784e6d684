"""Parts of scripts/gpu_check.py: each is a function of a `Bench` that returns figures."""
