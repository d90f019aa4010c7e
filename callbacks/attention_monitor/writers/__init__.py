"""Snapshots -> loggers."""
