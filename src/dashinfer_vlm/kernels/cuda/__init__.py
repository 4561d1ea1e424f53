"""Kernels for NVIDIA cards, written in Triton: the heavy functions of `layers/` with the same signatures.

The modules import triton, so nothing outside this folder imports them before `why_unavailable()` said None. Products of
matrices stay with torch. `TRITON_INTERPRET=1`, set before the first import, runs every kernel on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import subprocess

import torch

from dashinfer_vlm import envs

__all__ = ["why_unavailable"]


@functools.cache
def why_unavailable() -> str | None:
    """One clause for the log line that says why plain torch runs on the card instead; None when the kernels can run."""
    if envs.kernels() == "reference":
        return "DASHINFER_KERNELS=reference"
    envs.keep_compiled_kernels()
    try:
        for module in ("triton", "triton.knobs"):  # the second one is there since 3.4
            importlib.import_module(module)
    except ImportError as error:
        return f"triton cannot be imported ({error}); CUDA wheels of torch 2.8 and later bring one that can be used"
    return _why_nothing_starts() if torch.cuda.is_available() else None


def _why_nothing_starts() -> str | None:
    """What starts kernels is C, which triton builds the first time; an image for servers often has no compiler."""
    try:
        importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018 - asking for it builds it
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        return f"triton cannot build what starts them ({error}); it needs gcc or clang, and the headers of Python"
    return None
