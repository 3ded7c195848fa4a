"""Runs, stages and artifacts; Ray; the terminal."""
