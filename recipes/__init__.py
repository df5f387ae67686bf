"""Short runnable scripts; the first lines of each say the command, what it costs and what it should show."""

import backbone  # noqa: F401  its settings come before what a script imports first
from backbone.cli.stand_ins import spare_heavy_imports

spare_heavy_imports()
