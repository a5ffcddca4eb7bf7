"""`python -m pinrec_hf`: the same as `pinrec`."""

import sys

from pinrec_hf.cli import main

sys.exit(main())
