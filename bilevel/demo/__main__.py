"""`python -m bilevel.demo`."""

import sys

from bilevel.demo.main import main

if __name__ == "__main__":
    sys.exit(main())
