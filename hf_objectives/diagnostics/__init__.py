"""Seeing what a run did."""
