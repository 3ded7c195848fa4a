"""Stable Preference Optimization (arXiv 2507.07723) as a Ray pipeline."""

import logging

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program that imports a library chooses the handlers
