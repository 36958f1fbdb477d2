"""Measuring a model: accuracy, robustness, cost."""
