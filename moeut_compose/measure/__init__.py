"""Counts: parameters and multiply-accumulates, in closed form and traced on the built module."""
