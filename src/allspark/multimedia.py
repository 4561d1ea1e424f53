"""Embeddings on their way into a prompt: taken over by DLPack, checked, and laid onto the runs of their placeholders.

Everything that can be wrong is found here, before anything is scheduled: memory is only read once its type, shape and
strides are known, and a tensor enters the engine only as exactly long as its run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from allspark.dlpack import DlpackError, import_tensor
from allspark.status import AsStatus, RefusalError, wrong
from dashinfer_vlm.request import Item

__all__ = ["MultiMediaInfo"]

POSITIONS, HASH_INPUT, GRIDS = "positions", "hash_input", "grid_thw"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_IDENTIFIER = re.compile(r"[0-9]{1,18}")
_LARGEST_POSITION = 2**31 - 1


class MultiMediaInfo:
    """The embeddings of one request, by the placeholder token that they stand for."""

    def __init__(self) -> None:
        self._tensors: dict[str, list[torch.Tensor]] = {}

    def set_multimedia_type(self, multimedia_type: int) -> AsStatus:
        """Deprecated; has no effect."""
        return AsStatus.ALLSPARK_SUCCESS

    def add_multimedia_content(self, identifier: str, content: Sequence[Any]) -> AsStatus:
        """Add tensors: DLPack capsules, or objects with `__dlpack__`, such as tensors of torch and numpy.

        `identifier` is the decimal id of a placeholder token, which need not be in the vocabulary. The n-th maximal run
        of that id in the input ids belongs to the n-th tensor: float [length of the run, hidden size], on any device,
        with any strides, not copied. It must not be written to before the request has ended. Other identifiers:

        - `positions`: one int tensor [3, 1, S], the M-RoPE positions of all S input ids. Without it they are computed
          from the grids, and run on through embeddings that have none.
        - `grid_thw`: one int tensor [items, 3], frames, rows and columns of each item, counted in patches before
          merging, in the order in which the items stand in the prompt.
        - `hash_input`: one int tensor per item, in the same order: its identity for the prefix cache. Without it the
          embeddings themselves are hashed.

        Content that is added to an identifier again follows what is there. Returns ALLSPARK_PARAM_ERROR, and adds
        nothing, for an identifier or a tensor that cannot be. A capsule is used up by its import.
        """
        try:
            check = _check_of(identifier)
            if not isinstance(content, list | tuple) or not content:
                raise wrong(f"content of {identifier!r} must be a list of at least one tensor")
            tensors = [_import(value, f"tensor {i} of {identifier!r}", check) for i, value in enumerate(content)]
        except RefusalError as refusal:
            return refusal.status()
        self._tensors.setdefault(identifier, []).extend(tensors)
        return AsStatus.ALLSPARK_SUCCESS

    @property
    def embeddings(self) -> Mapping[int, Sequence[torch.Tensor]]:
        """By placeholder id."""
        return {int(name): tensors for name, tensors in self._tensors.items() if name.isdigit()}

    def extra(self, identifier: str) -> Sequence[torch.Tensor]:
        return self._tensors.get(identifier, ())


@dataclass(frozen=True, slots=True)
class Placed:
    """What a MultiMediaInfo means for one prompt."""

    items: tuple[Item, ...] = ()
    positions: torch.Tensor | None = None
    """int64 [3, S]."""


def place(
    info: MultiMediaInfo | None, ids: Sequence[int], *, widths: Sequence[int], vocab_size: int, merge_size: int
) -> Placed:
    """Lay embeddings onto their runs; raises RefusalError unless everything fits exactly. `widths` are the numbers of
    columns that the model takes."""
    embeddings = info.embeddings if info else {}
    _check_words(ids, embeddings, vocab_size)
    if info is None:
        return Placed()
    runs = list(_runs(ids, embeddings))
    for token, tensors in embeddings.items():
        _check_runs(token, [length for t, _, length in runs if t == token], tensors, widths)
    queues = {token: iter(tensors) for token, tensors in embeddings.items()}
    grids = _grids(info, runs, merge_size)
    hashes = _hashes(info, len(runs))
    items = []
    for i, (token, start, length) in enumerate(runs):
        embedding = next(queues[token])
        content_hash = _digest(hashes[i] if hashes else embedding, b"identity" if hashes else b"embedding")
        grid = grids[i] if grids else None
        items.append(
            Item(
                kind="image", start=start, num_tokens=length, content_hash=content_hash, grid=grid, embedding=embedding
            )
        )
    return Placed(tuple(items), _positions(info, len(ids)))


def import_ids(value: Any) -> list[int]:
    """Input ids from an int64 or int32 tensor [1, S] or [S], by DLPack or as it is, or from a list of ints."""
    if isinstance(value, list | tuple):
        return _listed_ids(value)
    tensor = _import(value, "input_ids", _check_ids)
    if tensor.ndim == 2 and tensor.shape[0] != 1:
        raise wrong(f"input_ids has shape {list(tensor.shape)}; it must be [1, S]: one request at a time")
    ids: list[int] = tensor.flatten().tolist()
    return _not_empty(ids)


def check_mask(value: Any, num_tokens: int) -> None:
    """An attention mask may be sent along; padding may not."""
    mask = _import(value, "attention_mask", _check_integer)
    if mask.numel() != num_tokens or not bool((mask == 1).all()):
        raise wrong(f"attention_mask must hold {num_tokens} ones; padded prompts are not supported")


Check = Callable[[torch.Tensor, str], None]


def _check_of(identifier: Any) -> Check:
    checks = {POSITIONS: _check_positions, HASH_INPUT: _check_integer, GRIDS: _check_grids}
    if not isinstance(identifier, str):
        raise wrong(f"the identifier is a {type(identifier).__name__}; it must be a string")
    if identifier in checks:
        return checks[identifier]
    if not _IDENTIFIER.fullmatch(identifier) or str(int(identifier)) != identifier:
        raise wrong(f"identifier {identifier!r} is neither the decimal id of a token nor one of {', '.join(checks)}")
    return _check_embedding


def _import(value: Any, name: str, check: Check) -> torch.Tensor:
    """Take over a tensor without a copy."""
    try:
        tensor = import_tensor(value).detach().resolve_neg()
    except DlpackError as error:
        raise wrong(f"{name} cannot be imported: {error}") from error
    if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise wrong(f"{name} is {tensor.layout} on {tensor.device}; only strided tensors on CPU or CUDA are supported")
    check(tensor, name)
    return tensor


def _check_embedding(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in _FLOATS:
        raise wrong(f"{name} is {tensor.dtype}; embeddings are float32, float16, bfloat16 or float64")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise wrong(f"{name} has shape {list(tensor.shape)}; embeddings are [rows, hidden size]")
    if not bool(torch.isfinite(tensor).all()):
        raise wrong(f"{name} has values that are not finite")


def _check_integer(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in _INTEGERS or not tensor.numel():
        raise wrong(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must hold whole numbers")


def _check_ids(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise wrong(f"{name} is {tensor.dtype}; it must be int64")
    if tensor.ndim not in (1, 2):
        raise wrong(f"{name} has shape {list(tensor.shape)}; it must be [1, S]")


def _check_positions(tensor: torch.Tensor, name: str) -> None:
    _check_integer(tensor, name)
    if tensor.shape[0] != 3 or tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[1] != 1):
        raise wrong(f"{name} has shape {list(tensor.shape)}; positions are [3, 1, S]")
    if int(tensor.min()) < 0 or int(tensor.max()) > _LARGEST_POSITION:
        raise wrong(f"{name} goes from {int(tensor.min())} to {int(tensor.max())}; positions fit 31 bits")


def _check_grids(tensor: torch.Tensor, name: str) -> None:
    _check_integer(tensor, name)
    if tensor.ndim != 2 or tensor.shape[1] != 3 or int(tensor.min()) < 1:
        raise wrong(f"{name} must be [items, 3] of positive numbers: frames, rows and columns in patches")


def _listed_ids(values: Sequence[Any]) -> list[int]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise wrong("input_ids must be a flat list of whole numbers")
    return _not_empty(list(values))


def _not_empty(ids: list[int]) -> list[int]:
    if not ids:
        raise RefusalError(AsStatus.ALLSPARK_EMPTY_REQUEST, "input_ids is empty")
    return ids


def _check_words(ids: Sequence[int], placeholders: Mapping[int, Any], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size and token not in placeholders:
            raise wrong(
                f"input id {index} is {token}: the vocabulary has {vocab_size} ids, and no multimedia content has the "
                f"identifier {str(token)!r}"
            )


def _runs(ids: Sequence[int], placeholders: Mapping[int, Any]) -> Iterator[tuple[int, int, int]]:
    """(token, first index, length) of every maximal run of a placeholder, in the order of the prompt."""
    index = 0
    while index < len(ids):
        start, token = index, ids[index]
        while index < len(ids) and ids[index] == token:
            index += 1
        if token in placeholders:
            yield token, start, index - start


def _check_runs(token: int, lengths: Sequence[int], tensors: Sequence[torch.Tensor], widths: Sequence[int]) -> None:
    if len(lengths) != len(tensors):
        raise wrong(f"the input ids hold {len(lengths)} runs of placeholder {token} for {len(tensors)} tensors")
    for i, (length, tensor) in enumerate(zip(lengths, tensors, strict=True)):
        rows, columns = tensor.shape
        if columns not in widths:
            known = " or ".join(str(width) for width in sorted(set(widths)))
            raise wrong(f"tensor {i} of {str(token)!r} has {columns} columns, the model's hidden size is {known}")
        if rows != length:
            raise wrong(f"tensor {i} of {str(token)!r} has {rows} rows, its run of placeholders has {length} tokens")


def _grids(info: MultiMediaInfo, runs: Sequence[tuple[int, int, int]], merge_size: int) -> list[tuple[int, int, int]]:
    tensors = info.extra(GRIDS)
    if not tensors:
        return []
    grids = [(t, h, w) for t, h, w in torch.cat([tensor.cpu() for tensor in tensors]).tolist()]
    if len(grids) != len(runs):
        raise wrong(f"{GRIDS} has {len(grids)} grids for {len(runs)} items")
    for i, ((t, h, w), (_, _, length)) in enumerate(zip(grids, runs, strict=True)):
        if h % merge_size or w % merge_size or t * h * w != length * merge_size**2:
            raise wrong(
                f"grid {i} is {t}x{h}x{w}; with {merge_size}x{merge_size} patches a token it is not {length} tokens"
            )
    return grids


def _hashes(info: MultiMediaInfo, num_items: int) -> Sequence[torch.Tensor]:
    tensors = info.extra(HASH_INPUT)
    if tensors and len(tensors) != num_items:
        raise wrong(f"{HASH_INPUT} has {len(tensors)} tensors for {num_items} items")
    return tensors


def _positions(info: MultiMediaInfo, num_tokens: int) -> torch.Tensor | None:
    tensors = info.extra(POSITIONS)
    if not tensors:
        return None
    if len(tensors) != 1 or tensors[0].numel() != 3 * num_tokens:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise wrong(f"{POSITIONS} has shape {shapes}; the input ids ask for one tensor [3, 1, {num_tokens}]")
    return tensors[0].reshape(3, num_tokens).to("cpu", torch.int64)


def _digest(tensor: torch.Tensor, kind: bytes) -> bytes:
    """32 bytes: equal for equal values of one shape and type alone. A contiguous tensor on the CPU is not copied."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    array = tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return blake2b(array.data, digest_size=32, person=kind, key=blake2b(head, digest_size=32).digest()).digest()
