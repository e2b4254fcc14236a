"""What makes a release: wheels (`make wheel`), the container images (Dockerfile), the conda package (recipe.yaml), the
kernel hub's layout (`make kernel-hub`).

docs/release.md is the way to it. Nothing of this is installed.
"""
