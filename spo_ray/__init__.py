"""Stable Preference Optimization (arXiv 2507.07723) as a Ray pipeline."""

__version__ = "0.1.0"
