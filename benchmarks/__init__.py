"""Measurements behind the documentation's figures; every script states its command and writes its table."""

import backbone  # noqa: F401  its settings come before what a script imports first
from backbone.cli.stand_ins import spare_heavy_imports

spare_heavy_imports()
