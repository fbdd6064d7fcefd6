"""`python -m edge_compress`: the command line."""

import sys

from edge_compress.pipeline.cli.main import main

sys.exit(main())
