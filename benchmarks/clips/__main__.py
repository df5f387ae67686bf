"""`python -m benchmarks.clips` is `benchmarks.clips.words`."""

from backbone.cli.commands import run_main
from benchmarks.clips.words import main

if __name__ == "__main__":
    run_main(main)
