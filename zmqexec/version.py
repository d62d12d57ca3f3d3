"""The version, in one place that the build can read without importing anything.

Runs in: driver | worker | server.
"""

__version__ = "0.1.0"
