"""HTTP: JSON and SSE to typed values and back; nothing below this package knows JSON."""
