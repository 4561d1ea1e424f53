"""Native CPU kernels: torch tensors in and out, the work done by the extension module `_cpu`.

Every function takes CPU tensors, checks shapes and dtypes before anything is read (`ValueError` names the argument,
what was expected and what came), releases the GIL and runs on one persistent set of threads. `DASHINFER_KERNELS`
chooses the instruction level: `auto` (default, the best that the processor runs), `amx`, `avx512_bf16`, `avx512`,
`avx2`, `generic`, or `reference`, which makes `available()` false so that the layers use plain torch.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from dashinfer_vlm import envs
from dashinfer_vlm.kernels.choices import Choices, Likeliest

PackedType = Literal["float32", "bfloat16", "int8", "int8 in groups", "int4", "int4 with zeros"]
Epilogue = Literal["none", "residual", "silu_mul", "gelu", "gelu_tanh", "quick_gelu"]


def _load() -> tuple[ModuleType | None, str | None]:
    level = envs.kernels()
    if level == "reference":
        return None, "DASHINFER_KERNELS=reference"
    try:
        module = importlib.import_module("dashinfer_vlm.kernels._cpu")
    except ImportError as error:
        return None, f"the extension module is not built for this Python ({error}); install with a C++20 compiler"
    try:
        module.set_isa(level)
    except ValueError as error:
        raise ValueError(f"DASHINFER_KERNELS: {error}, reference") from error
    return module, None


_module, _why_unavailable = _load()


def available() -> bool:
    """Whether the functions below can be called."""
    return _module is not None


def why_unavailable() -> str | None:
    """One clause for the log line that says why plain torch runs instead; None when the kernels are available."""
    return _why_unavailable


def extension() -> Any:
    """The module of the kernels; raises RuntimeError where it is not available."""
    if _module is None:
        raise RuntimeError(f"native CPU kernels are not available: {_why_unavailable}")
    return _module


def isa() -> str:
    """The instruction level in use, one of `levels()`."""
    level: str = extension().isa()
    return level


def multiplies_bfloat16() -> bool:
    """Whether the level in use has bfloat16 arithmetic: `linear` then rounds x to bfloat16 for bfloat16 weights."""
    multiplies: bool = extension().multiplies_bfloat16()
    return multiplies


def levels() -> list[str]:
    """Levels that this build has and this processor runs, best first."""
    names: list[str] = extension().levels()
    return names


def set_isa(level: str) -> None:
    """Switch the level for all later calls. Raises ValueError with the list of levels.

    Weights must be packed anew where the levels' layouts differ: `amx`, `avx512_bf16` and `avx512` share one, `avx2`
    and `generic` another. `linear` refuses the wrong ones; float32 weights are the same everywhere.
    """
    extension().set_isa(level)


def num_threads() -> int:
    """Threads that take part in one kernel, the caller included; those of the affinity mask at first."""
    n: int = extension().num_threads()
    return n


def set_num_threads(n: int) -> None:
    """Use `n >= 1` threads from the next kernel on."""
    extension().set_num_threads(n)


def set_cores(cores: Sequence[int]) -> None:
    """Pin thread t of the kernels to `cores[t]` from the next kernel on, but for thread 0, which is whoever calls;
    empty lets them run anywhere."""
    extension().set_cores(list(cores))


def set_memory_nodes(nodes: Sequence[int]) -> None:
    """Spread weights that are packed from now on page by page over these NUMA nodes; empty leaves each page on the node
    of the thread that writes it first. Raises OSError when the system refuses."""
    extension().set_memory_nodes(list(nodes))


@dataclass(frozen=True, slots=True)
class PackedShape:
    """How a packed weight [num_rows, depth] is rounded and laid out."""

    type: PackedType
    num_rows: int
    depth: int
    group_size: int
    """Columns per scale: 32 or 128 for 4 bits, 128 for "int8 in groups", 0 for the others."""
    gate_up: bool


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [num_rows, depth] in the order in which `linear` reads it, on huge pages."""

    handle: Any
    num_rows: int
    depth: int
    gate_up: bool

    @property
    def shape(self) -> PackedShape:
        h = self.handle
        return PackedShape(h.type, h.rows, h.depth, h.group_size, h.gate_up)

    @property
    def num_columns(self) -> int:
        """Columns of `linear`'s result: half of the rows when gate and up are interleaved."""
        return self.num_rows // 2 if self.gate_up else self.num_rows

    @property
    def num_bytes(self) -> int:
        size: int = self.handle.nbytes
        return size

    @property
    def panels(self) -> memoryview:
        """Its bytes, to be kept in a file; they live as long as the view and cannot be written."""
        return memoryview(extension().panels(self.handle))

    def checksum(self) -> int:
        """64 bits over `panels`, to find damage; not made to withstand somebody who wants it equal."""
        value: int = self.handle.checksum()
        return value


def pack_linear(weight: Tensor, *, gate_up: bool = False) -> PackedWeight:
    """Pack weight [N, K] (bfloat16 or float32, any strides, K up to 65536), keeping its dtype; it is copied.

    With `gate_up` the first N/2 rows are the gate projection and the rest the up projection; they are interleaved so
    that `linear(..., epilogue="silu_mul")` multiplies them in registers.
    """
    return _packed(extension().pack_linear(weight, gate_up))


def pack_linear_int8(weight: Tensor, group_size: int = 0, *, gate_up: bool = False) -> PackedWeight:
    """Like `pack_linear`, rounded to 8 bits with one scale `bfloat16(max |w| / 127)` per row, or per row and
    `group_size` (128) columns.

    Without groups (0) `linear` rounds every row of x to 8 bits too (scale `max |x| / 127`) and sums exactly in 32-bit
    integers. With groups it rounds x to 16 bits per row and group, which loses less than the float32 sums of a wide
    product do: the weight alone is rounded.
    """
    return _packed(extension().pack_linear_int8(weight, group_size, gate_up))


def pack_linear_int4(weight: Tensor, group_size: int = 128, *, gate_up: bool = False) -> PackedWeight:
    """Like `pack_linear`, rounded to 4 bits with one bfloat16 scale per row and `group_size` (32 or 128) columns.

    The element of largest magnitude of a group is -8 scales. `linear` sums exactly in 32-bit integers: at the AVX-512
    levels blocks of 32 columns of x, each row and block rounded to 8 bits (scale `max |x| / 127`), which adds about a
    hundredth to the error that 4-bit weights have anyway; at the others groups, x rounded to 16 bits per row and group.
    """
    return _packed(extension().pack_linear_int4(weight, group_size, gate_up))


def pack_stored_int4(
    numbers: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int = 128, *, gate_up: bool = False
) -> PackedWeight:
    """As `pack_linear_int4`, of numbers that have 4 bits already: uint8 [N, K] below 16, float32 `scales` [N, groups],
    which are rounded to bfloat16, and uint8 `zeros` [N, groups], None for 8. A weight is (number - zero) * scale."""
    return _packed(extension().pack_stored_int4(numbers, scales, zeros, group_size, gate_up))


def packing() -> str:
    """Names the layout of packed weights; one that was kept under another name must not be read."""
    layout: str = extension().packing()
    return layout


def read_packed(fd: int, offset: int, num_bytes: int, shape: PackedShape) -> PackedWeight:
    """The weight of `shape` whose `num_bytes` of `panels` lie at `offset` of the open file `fd`.

    Its threads read it, the ones that will use it, straight into its memory. Raises ValueError for sizes that do not
    agree and for a file that ends too early, OSError when reading fails. Compare its `checksum()` yourself.
    """
    s = shape
    handle = extension().read_packed(fd, offset, num_bytes, s.type, s.num_rows, s.depth, s.group_size, s.gate_up)
    return _packed(handle)


def _packed(handle: Any) -> PackedWeight:
    return PackedWeight(handle, handle.rows, handle.depth, handle.gate_up)


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    epilogue: Epilogue = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`epilogue(x @ W.T + bias)` as float32 [M, N], or [M, N/2] for `silu_mul`.

    x: float32 [M, K], rows may be strided. bias: float32 [N] in the weight's own row order. residual: float32 [M, N],
    added by the epilogue `residual`; it may be `out` itself. out must not share memory with x. Sums are float32. At the
    levels that multiply bfloat16, x is rounded to it where the weight is bfloat16, and at `amx` 16 or more rows are
    also multiplied with weights in groups that way: both are rounded to bfloat16 then.
    gelu is the exact (erf) one, gelu_tanh its approximation by tanh, quick_gelu is `v * sigmoid(1.702 v)`, silu_mul is
    `silu(gate) * up`.
    """
    if out is None:
        out = torch.empty((x.shape[0], weight.num_columns), dtype=torch.float32)
    extension().linear(x, weight.handle, bias, out, epilogue, residual)
    return out


def embed_patches(patches: Tensor, weight: PackedWeight, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """`patches @ W.T + bias` as float32 [P, N] of uint8 patches [P, K], which are widened a few rows at a time.

    Patches may be strided between rows. weight: from `pack_linear`, float32 for the precision of the layer before it.
    """
    if out is None:
        out = torch.empty((patches.shape[0], weight.num_columns), dtype=torch.float32)
    extension().embed_patches(patches, weight.handle, bias, out)
    return out


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of each sequence's queries over its context; float32 [T, H, D].

    q: float32 [T, H, D], any strides before D. Sequence s owns rows `query_starts[s] .. query_starts[s + 1]` (int32
    [S + 1]), the last tokens of its `context_lens[s]` (int32 [S]). The context lies in the blocks `block_tables[s]`
    (int32 [S, B]) of the caches that `write_kv` filled, which are read in place. Over a bfloat16 cache the levels that
    multiply bfloat16 round q and the softmax's weights to it; sums are float32.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=torch.float32)
    extension().paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale, out)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store k and v (float32 [T, Hkv, D]) at `slots` (int64 [T], block * block_size + offset) of the caches
    [num_blocks, block_size, Hkv, D]; float32 ones as they are, bfloat16 ones get the nearest value, ties to even.

    int8 caches [num_blocks, block_size, Hkv, D + 4] get multiples of `max |x| / 127` of the row, a float32 in its last
    four bytes; keys are transformed before, as `layers.attention.write_kv` says.
    """
    extension().write_kv(k, v, k_cache, v_cache, slots)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    first_query: int = 0,
    out: Tensor | None = None,
    *,
    bfloat16: bool = False,
) -> Tensor:
    """Attention of every position over its own segment, no mask within it; float32 [Q, H, D].

    k, v: float32 [P, H, D], any strides before D (views of one qkv are fine); q: the part [Q, H, D] of the P positions
    that begins at `first_query`. starts: int32 [n + 1], segment i is `starts[i] .. starts[i + 1]`. With `bfloat16` the
    levels that multiply it round q, k, v and the softmax's weights to it and add in float32; to others it means
    nothing.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=torch.float32)
    extension().varlen_attention(q, k, v, starts, scale, first_query, bfloat16, out)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x (float32 [T, H, D], any strides before D) in place by the float32 tables [T, D / 2]: channel i with
    channel i + D / 2 (the half-split form of RoPE, Su et al. 2021)."""
    extension().rope(x, cos, sin)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> None:
    """`rope` on q in place, and `write_kv` of v and of the rotated k, whose memory is left as it is."""
    extension().rope_write_kv(q, k, v, cos, sin, k_cache, v_cache, slots)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, shift: Tensor | None = None
) -> Tensor:
    """RMSNorm of float32 [T, C] (rows may be strided) with weight float32 [C]; out may be x (Zhang, Sennrich 2019).
    `shift`, float32 [C], is added to x first, by torch: no model that these kernels run asks for it."""
    x = x if shift is None else x + shift
    if out is None:
        out = torch.empty(x.shape, dtype=torch.float32)
    extension().norm(x, weight, None, eps, out)
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None, *, shift: Tensor | None = None
) -> Tensor:
    """LayerNorm of float32 [T, C] (rows may be strided) with weight and bias float32 [C]; out may be x. `shift` as in
    `rms_norm`."""
    x = x if shift is None else x + shift
    if out is None:
        out = torch.empty(x.shape, dtype=torch.float32)
    extension().norm(x, weight, bias, eps, out)
    return out


def causal_conv(
    x: Tensor, inputs: Tensor, weight: Tensor, seats: Tensor, query_starts: Tensor, context_lens: Tensor
) -> Tensor:
    """SiLU of the weighted sum over the newest inputs of each channel of x (float32 [T, C], rows may be strided); the
    rest, and what becomes of `inputs` (float32 [seats, K - 1, C]), as in `layers.delta_net.causal_conv`."""
    out = torch.empty(x.shape, dtype=torch.float32)
    extension().causal_conv(x, inputs, weight, seats, query_starts, context_lens, out)
    return out


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    memory: Tensor,
    seats: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """float32 [T, H, V]: `layers.delta_net.delta_rule`, a token after the other. q and k are float32 [T, Hk, K] and v
    is [T, H, V], any strides before the last axis; memory is [seats, H, K, V]."""
    out = torch.empty(v.shape, dtype=torch.float32)
    extension().delta_rule(q, k, v, beta, decay, memory, seats, query_starts, context_lens, out)
    return out


def choose(logits: Tensor, choices: Choices) -> Tensor:
    """A token for every row of logits (float32 [R, V], rows may be strided), which stay as they are; int32 [R].

    NOT_A_NUMBER or NOTHING_ALLOWED (`choices.py`) stands where there is no token. Exponentials are float32 with a
    relative error of 2e-7, sums float64 but for spans of 128 weights.
    """
    tokens = torch.empty(len(logits), dtype=torch.int32)
    extension().choose(logits, choices, tokens)
    return tokens


def likeliest(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Likeliest:
    """What `logprobs` tells of `tokens` (int32 [n]), one in each of `rows` (int32 [n]) of logits (float32 [R, V])."""
    found = Likeliest.empty(len(rows), min(num_top, logits.shape[1]))
    extension().likeliest(logits, rows, tokens, found.largest, found.log_totals, found.ranks, found.top_ids)
    return found
