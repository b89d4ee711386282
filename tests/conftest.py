"""What holds for all tests: an error of the compiler's own is an error, not the next rung of its ladder."""

import os

os.environ["FXPRUNE_STRICT"] = "1"
