"""Questions, samples and pairs, on Ray Data."""
