"""`python -m kgrec_jax` is `kgrec`."""

import sys

from kgrec_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
