"""What an export may be, as the command line and Python name it."""

from typing import Literal

Format = Literal["factored", "dense"]
Refit = Literal["none", "sequential"]
