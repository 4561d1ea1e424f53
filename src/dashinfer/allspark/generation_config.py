"""`allspark.generation_config` by its other documented name."""

from allspark.generation_config import *  # noqa: F403
from allspark.generation_config import __all__ as __all__
