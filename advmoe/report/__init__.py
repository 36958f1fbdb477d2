"""Results, as dictionaries or JSON, made into figures."""
