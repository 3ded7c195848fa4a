"""``python -m benchmarks.study``. Processes that it starts can't import functions of this file, so it has none."""

from benchmarks.study.run import main

if __name__ == "__main__":
    main()
