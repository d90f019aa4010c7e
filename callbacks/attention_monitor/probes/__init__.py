"""Fixed inputs whose patterns can be compared over time, and what heads are scored by on them."""
