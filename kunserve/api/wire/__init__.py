"""What every route stands on: the server below, bodies, fields, admission, errors, SSE."""
