"""Training, on Ray Train."""
