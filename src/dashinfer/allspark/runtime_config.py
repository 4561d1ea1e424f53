"""`allspark.runtime_config` by its other documented name."""

from allspark.runtime_config import *  # noqa: F403
from allspark.runtime_config import __all__ as __all__
