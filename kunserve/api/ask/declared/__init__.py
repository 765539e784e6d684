"""What routes take: each body declared once, for the check, the words of its errors and the OpenAPI document."""
