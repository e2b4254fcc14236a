"""Build script. All metadata lives in pyproject.toml; compiled parts hook in here."""

from setuptools import setup

setup()
