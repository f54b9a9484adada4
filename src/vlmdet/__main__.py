"""`python -m vlmdet`, the same as `vlmdet`; also what `accelerate launch -m vlmdet` runs."""

import sys

from vlmdet.cli import main

sys.exit(main())
