"""Snapshots -> what broke, and what heads have become."""
