"""`python -m jax_epmoe.generate`."""

import sys

from jax_epmoe.generate.cli import main

sys.exit(main())
