"""The endpoints of operators: page, feed, burst, drop and restore."""
