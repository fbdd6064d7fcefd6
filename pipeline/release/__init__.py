"""Release bundles: an archive with artifact, model card, report, SBOM and signature; and reading finished runs and bundles back.

In: run folders. Out: reproducible archives. Start at `release.py`.
"""
