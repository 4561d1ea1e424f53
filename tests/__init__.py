import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
"""Numpy, which reads it when it is first imported, multiplies small matrices in interpreted kernels: its threads would
wait for each other, busily."""
