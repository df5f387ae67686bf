"""What the documentation states as figures, measured; every script says its command, and writes its table."""

import backbone  # noqa: F401  its settings come before what a script imports first
