"""`python -m itm_fast`: the same program as `itm-fast`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
