"""``python -m spo_ray`` and ``spo-ray``: the command line, which needs the extra ``pipeline``."""

import sys


def main() -> None:
    """Run the command line; without the packages that it needs, say what to install."""
    try:
        from spo_ray.pipeline.cli import main as run
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("spo_ray"):
            raise
        print(f"error: no package {error.name}: the command line needs pip install 'spo-ray[cpu]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
