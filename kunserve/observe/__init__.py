"""What is seen of a server: counters, the last seconds, frames for viewers. Knows no engine."""
