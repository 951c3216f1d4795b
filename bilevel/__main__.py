"""`python -m bilevel` is the command `bilevel`."""

import sys

from bilevel.cli import main

sys.exit(main())
