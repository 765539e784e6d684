"""What users type: command lines to values, and the process of the server."""
