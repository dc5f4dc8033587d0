"""Packed models in programs of others."""
