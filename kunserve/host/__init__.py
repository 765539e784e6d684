"""What this machine leaves to the process, and memory that is taken of it. Without torch."""
