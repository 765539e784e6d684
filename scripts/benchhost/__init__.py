"""Parts of scripts/bench_host.py."""
