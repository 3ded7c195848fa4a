"""``python -m spo_ray``: the command line."""

from spo_ray.pipeline.cli import main

main()
