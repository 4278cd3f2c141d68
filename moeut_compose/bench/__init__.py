"""Measurements of speed and memory; nothing here runs in tests of behaviour."""
