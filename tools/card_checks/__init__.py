"""What `tools/gpu_check.py` looks at, a module for each subject."""
