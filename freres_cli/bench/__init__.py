"""Clocks and memory meters."""
