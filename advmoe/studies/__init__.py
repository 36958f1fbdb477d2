"""The paper's tables and figures, and questions beyond them, each a named study."""
