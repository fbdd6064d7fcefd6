"""`python -m edge_compress`: the command line."""

from edge_compress.pipeline.cli.main import script

script()
