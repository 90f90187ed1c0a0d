"""`python -m aksae`: the same as the command `aksae`."""

import sys

from .cli import main

sys.exit(main())
