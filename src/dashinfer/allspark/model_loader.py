"""`allspark.model_loader` by its other documented name."""

from allspark.model_loader import *  # noqa: F403
from allspark.model_loader import __all__ as __all__
