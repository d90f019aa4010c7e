"""Arrays -> pictures."""
