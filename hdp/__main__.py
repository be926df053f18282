"""`python -m hdp` is `hdp`; so is `torchrun ... -m hdp train`."""

import sys

from hdp.cli import main

sys.exit(main())
