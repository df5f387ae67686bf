"""`python -m benchmarks.control` is `benchmarks.control.scenes`."""

from backbone.io.console import run_app
from benchmarks.control.scenes import app

if __name__ == "__main__":
    run_app(app)
