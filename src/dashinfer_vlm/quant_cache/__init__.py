"""Quantised weights that one start leaves on disk for the next.

`store` is what a model in the making asks, `folder` knows what lies where and how much may, `entry` is a file's format.
"""
