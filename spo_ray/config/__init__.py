"""Configuration of a run: the schema, reading of files, and dotted keys."""
