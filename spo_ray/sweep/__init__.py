"""Sweeps with Ray Tune: trials, their scores, and what they tell."""
