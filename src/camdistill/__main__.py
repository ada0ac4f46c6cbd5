"""`python -m camdistill`."""

import sys

from camdistill.cli import main

sys.exit(main())
