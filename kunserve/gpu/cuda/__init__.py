"""GPUs as devices: driver calls, streams, copies between them, pinned host memory."""
