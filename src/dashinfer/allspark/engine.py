"""`allspark.engine` by its other documented name."""

from allspark.engine import *  # noqa: F403
from allspark.engine import __all__ as __all__
