"""`python -m kgrec_jax` is `kgrec`."""

import sys

from kgrec_jax.cli import main

sys.exit(main())
