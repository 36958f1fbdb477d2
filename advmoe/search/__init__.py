"""Hyper-parameter search by Optuna (extra `search`): trials are tasks of an engine, scored on the validation split."""
