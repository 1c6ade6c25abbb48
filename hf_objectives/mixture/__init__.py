"""Mixtures: several sources as one dataset, each with its share at every moment."""
