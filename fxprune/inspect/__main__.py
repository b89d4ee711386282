"""`python -m fxprune.inspect`."""

import sys

from fxprune.inspect import main

if __name__ == "__main__":
    sys.exit(main())
