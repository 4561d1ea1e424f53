"""The package `allspark` by its other documented name."""

from allspark import *  # noqa: F403
from allspark import __all__ as __all__
