"""`python -m benchmarks.customize` is `benchmarks.customize.concepts`."""

from backbone.io.console import run_app
from benchmarks.customize.concepts import app

if __name__ == "__main__":
    run_app(app)
