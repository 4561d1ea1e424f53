"""Tensors from anywhere, by DLPack, looked at before they are touched.

torch's own importer trusts the producer, and ends the process on strides or types that it cannot hold; so the header
behind a capsule is read here first (layout: dlpack.h of DLPack 0.8, and 1.0 for versioned capsules).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

__all__ = ["DlpackError", "import_tensor"]

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_MAX_DIMENSIONS = 8
_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4
_TYPES = {
    (_INT, 8),
    (_INT, 16),
    (_INT, 32),
    (_INT, 64),
    (_UINT, 8),
    (_FLOAT, 16),
    (_FLOAT, 32),
    (_FLOAT, 64),
    (_BFLOAT, 16),
}


class DlpackError(ValueError):
    """This is not a tensor, or one that cannot be taken over."""


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


def import_tensor(value: Any) -> torch.Tensor:
    """Take over a tensor without a copy: a torch tensor, a capsule, or an object with `__dlpack__`.

    Raises DlpackError for anything else, for a capsule that was used before, and for a type, a device or strides that
    torch cannot hold.
    """
    if isinstance(value, torch.Tensor):
        return value
    capsule = value if _is_capsule(value) else _export(value)
    _check(_header(capsule))
    try:
        return from_dlpack(capsule)
    except (RuntimeError, BufferError, ValueError) as error:
        raise DlpackError(_first_line(error)) from error


def _is_capsule(value: object) -> bool:
    return type(value).__name__ == "PyCapsule"


def _export(value: Any) -> object:
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        raise DlpackError(f"a {type(value).__name__} is neither a DLPack capsule nor an object with __dlpack__")
    try:
        device_type, _ = value.__dlpack_device__()
        stream = {"stream": torch.cuda.current_stream().cuda_stream} if int(device_type) == _CUDA else {}
        capsule = value.__dlpack__(**stream)
    except Exception as error:  # a producer may raise whatever it likes
        raise DlpackError(f"its producer says: {_first_line(error)}") from error
    if not _is_capsule(capsule):
        raise DlpackError(f"its __dlpack__ gave a {type(capsule).__name__}, not a capsule")
    return capsule


def _header(capsule: object) -> _Tensor:
    for name, kind in ((b"dltensor", _Tensor), (b"dltensor_versioned", _Versioned)):
        if _is_valid(ctypes.py_object(capsule), name):
            address = _pointer(ctypes.py_object(capsule), name)
            header = ctypes.cast(address, ctypes.POINTER(kind)).contents
            return header if isinstance(header, _Tensor) else _tensor_of(header)
    raise DlpackError("the capsule was used before, or is none of DLPack's; a capsule can be imported once")


def _tensor_of(header: Any) -> _Tensor:
    if header.major != 1:
        raise DlpackError(f"DLPack version {header.major}.{header.minor} is not supported")
    tensor: _Tensor = header.tensor
    return tensor


def _check(header: _Tensor) -> None:
    if header.device_type not in (_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED):
        raise DlpackError(f"DLPack device {header.device_type} is not supported; send it from CPU or CUDA memory")
    if header.device_type != _CPU and not torch.cuda.is_available():
        raise DlpackError("it is on a CUDA device, which this process cannot use")
    if (header.code, header.bits) not in _TYPES or header.lanes != 1:
        raise DlpackError(f"DLPack type code {header.code} of {header.bits} bits x {header.lanes} is not supported")
    if not 0 <= header.ndim <= _MAX_DIMENSIONS:
        raise DlpackError(f"it has {header.ndim} dimensions; the limit is {_MAX_DIMENSIONS}")
    shape = [header.shape[i] for i in range(header.ndim)]
    strides = [header.strides[i] for i in range(header.ndim)] if header.strides else []
    if min(shape, default=0) < 0 or min(strides, default=0) < 0:
        raise DlpackError(f"it has shape {shape} and strides {strides}; neither may be negative")
    if not header.data and 0 not in shape:
        raise DlpackError(f"it has shape {shape}, but no memory")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
