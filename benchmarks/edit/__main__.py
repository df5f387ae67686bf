"""`python -m benchmarks.edit` is `benchmarks.edit.scenes`."""

from backbone.io.console import notify, run_app
from benchmarks.edit.scenes import app

if __name__ == "__main__":
    notify("MojiEdit")
    run_app(app)
