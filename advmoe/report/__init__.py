"""Figures and pages of results, which come as dictionaries or JSON."""
