"""Home of the documented import `from dashinfer import allspark`."""

from dashinfer import allspark as allspark

__all__ = ["allspark"]
