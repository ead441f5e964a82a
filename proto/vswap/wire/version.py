"""The version of this vswap."""

from importlib.metadata import version

VERSION = version("vswap")
"""Looked up once: a lookup opens files."""
