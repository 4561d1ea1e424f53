"""`allspark.prompt_utils` by its other documented name."""

from allspark.prompt_utils import *  # noqa: F403
from allspark.prompt_utils import __all__ as __all__
