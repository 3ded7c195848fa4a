"""SFT and preference training on Ray Train."""
