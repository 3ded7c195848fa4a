"""The job, and one script for each part of it."""
