"""Tokens chosen on the card, by the rules of `layers.sampling` and the same random numbers.

One program per row. It sets aside what a truncation cannot keep, in two or three passes over the row; thresholds are
then found by bisection on integers that order like floats, over the few candidates that are left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dashinfer_vlm.kernels.choices import NOT_A_NUMBER, NOTHING_ALLOWED, Choices, Likeliest, arrays_of, moved
from dashinfer_vlm.kernels.cuda.launch import check, launch

__all__ = ["choose", "drawn", "likeliest", "tokens_of"]

BLOCK = 4096
"""Logits that a program looks at together."""
NAN, NOTHING = tl.constexpr(NOT_A_NUMBER), tl.constexpr(NOTHING_ALLOWED)
LAST = tl.constexpr(2**31 - 1)
LIGHTEST = tl.constexpr(1.1754943508222875e-38)
"""What weighs less is never drawn: the smallest number that every card keeps."""


@triton.jit
def _order(x):
    """int64 that orders like the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _with_order(order):
    """The float32 of which `_order` is this."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _allowed(logits, shaped, words, stride, words_stride, V, HAS_MASK: tl.constexpr, B: tl.constexpr):
    """A copy of part of a row, -inf where the mask does not allow a token."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    x = tl.load(logits + r * stride + i, mask=i < V, other=0.0)
    if HAS_MASK:
        word = tl.load(words + r * words_stride + i // 32, mask=i < V, other=0)
        x = tl.where(((word >> (i % 32)) & 1) != 0, x, -float("inf"))
    tl.store(shaped + r * V + i, x, mask=i < V)


@triton.jit
def _shape(
    shaped, bias_starts, bias_ids, biases, seen_starts, seen_ids, seen_counts, forbidden_starts, forbidden_ids,
    repetition, presence, frequency, V, B: tl.constexpr,
):  # fmt: skip
    """Biases, penalties and forbidden tokens of one row. What the mask made -inf stays so."""
    r = tl.program_id(0)
    row = shaped + r.to(tl.int64) * V
    i = tl.arange(0, B)
    end = tl.load(bias_starts + r + 1)
    for j in tl.range(tl.load(bias_starts + r), end, B):
        place = row + tl.load(bias_ids + j + i, mask=j + i < end, other=0)
        bias = tl.load(biases + j + i, mask=j + i < end, other=0.0)
        tl.store(place, tl.load(place, mask=j + i < end, other=0.0) + bias, mask=j + i < end)
    tl.debug_barrier()  # the next list may hold the same tokens
    strength = tl.load(repetition + r)
    once = tl.load(presence + r)
    each = tl.load(frequency + r)
    end = tl.load(seen_starts + r + 1)
    for j in tl.range(tl.load(seen_starts + r), end, B):
        place = row + tl.load(seen_ids + j + i, mask=j + i < end, other=0)
        count = tl.load(seen_counts + j + i, mask=j + i < end, other=0)
        x = tl.load(place, mask=j + i < end, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, tl.zeros([B], tl.float32) + strength), x * strength)
        x -= tl.where(count > 0, once + each * count.to(tl.float32), 0.0)
        tl.store(place, x, mask=j + i < end)
    tl.debug_barrier()
    end = tl.load(forbidden_starts + r + 1)
    for j in tl.range(tl.load(forbidden_starts + r), end, B):
        place = row + tl.load(forbidden_ids + j + i, mask=j + i < end, other=0)
        tl.store(place, tl.full([B], -float("inf"), tl.float32), mask=j + i < end)


@triton.jit
def _largest(row, V, B: tl.constexpr):
    """The largest of every B-th logit, where the first of them stands, and whether any is NaN."""
    i = tl.arange(0, B)
    best = tl.full([B], -float("inf"), tl.float32)
    where = tl.zeros([B], tl.int32) + i
    bad = tl.zeros([B], tl.int32)
    for j in tl.range(0, V, B):
        x = tl.load(row + j + i, mask=j + i < V, other=-float("inf"))
        bad = bad | (x != x).to(tl.int32)
        where = tl.where(x > best, j + i, where)
        best = tl.where(x > best, x, best)
    return best, where, tl.max(bad, 0) > 0


@triton.jit
def _kth(values, k):
    """The `k`-th largest of a block, to the bit."""
    low = tl.full((), -2147483648, tl.int64)
    high = _order(tl.max(values, 0))
    orders = _order(values)
    while low < high:
        middle = low + (high - low + 1) // 2
        if tl.sum((orders >= middle).to(tl.int32), 0) >= k:
            low = middle
        else:
            high = middle - 1
    return _with_order(low)


@triton.jit
def _mass(row, V, top, temperature, lightest, B: tl.constexpr):
    """What the tokens weigh that weigh `lightest` at least."""
    i = tl.arange(0, B)
    total = tl.zeros((), tl.float64)
    for j in tl.range(0, V, B):
        weight = tl.exp((tl.load(row + j + i, mask=j + i < V, other=-float("inf")) - top) / temperature)
        total += tl.sum(tl.where(weight >= lightest, weight, 0.0).to(tl.float64), 0)
    return total


@triton.jit
def _gather(row, V, top, temperature, least, lightest, values, ids, B: tl.constexpr):
    """Candidates in their order: logits from `least` up that weigh `lightest` at least. Returns how many."""
    i = tl.arange(0, B)
    n = tl.zeros((), tl.int32)
    for j in tl.range(0, V, B):
        x = tl.load(row + j + i, mask=j + i < V, other=-float("inf"))
        kept = ((x >= least) & (tl.exp((x - top) / temperature) >= lightest)).to(tl.int32)
        place = n + tl.cumsum(kept, 0) - 1
        tl.store(values + place, x + 0.0, mask=kept > 0)  # -0 and 0 are equal, but not in their bits
        tl.store(ids + place, j + i, mask=kept > 0)
        n += tl.sum(kept, 0)
    tl.debug_barrier()  # candidates are read by other threads than wrote them
    return n


@triton.jit
def _amount(values, n, least, BY_MASS: tl.constexpr, B: tl.constexpr):
    """How many candidates there are from the order `least` up, or their sum."""
    i = tl.arange(0, B)
    total = tl.zeros((), tl.float64)
    for j in tl.range(0, n, B):
        x = tl.load(values + j + i, mask=j + i < n, other=0.0)
        kept = (_order(x) >= least) & (j + i < n)
        if BY_MASS:
            total += tl.sum(tl.where(kept, x, 0.0).to(tl.float64), 0)
        else:
            total += tl.sum(kept.to(tl.int32), 0).to(tl.float64)
    return total


@triton.jit
def _truncate(values, n, top, goal, low, DROPPED: tl.constexpr, BY_MASS: tl.constexpr, B: tl.constexpr):
    """Keep the fewest candidates, the largest first and of equal ones the first, that are as many as `goal`, or weigh
    as much; the others become `DROPPED`. Orders lie between `low` and that of `top`."""
    high = _order(top)
    while low < high:
        middle = low + (high - low + 1) // 2
        if _amount(values, n, middle, BY_MASS, B) >= goal:
            low = middle
        else:
            high = middle - 1
    wanted = goal - _amount(values, n, low + 1, BY_MASS, B)
    if BY_MASS:
        wanted = tl.ceil(wanted / tl.maximum(_with_order(low), LIGHTEST).to(tl.float64))
    wanted = tl.maximum(wanted, 1.0)
    i = tl.arange(0, B)
    seen = tl.zeros((), tl.int32)
    for j in tl.range(0, n, B):
        x = tl.load(values + j + i, mask=j + i < n, other=DROPPED)
        equal = (_order(x) == low).to(tl.int32)
        rank = seen + tl.cumsum(equal, 0)
        kept = (_order(x) > low) | ((equal > 0) & (rank <= wanted))
        tl.store(values + j + i, tl.where(kept, x, DROPPED), mask=j + i < n)
        seen += tl.sum(equal, 0)
    tl.debug_barrier()


@triton.jit
def _weigh(values, n, top, temperature, B: tl.constexpr):
    """Candidates become what they weigh."""
    i = tl.arange(0, B)
    for j in tl.range(0, n, B):
        x = tl.load(values + j + i, mask=j + i < n, other=0.0)
        tl.store(values + j + i, tl.exp((x - top) / temperature), mask=j + i < n)
    tl.debug_barrier()


@triton.jit
def _draw(values, ids, n, uniform, B: tl.constexpr):
    """The candidate where the share `uniform` of all weights is passed."""
    i = tl.arange(0, B)
    goal = _amount(values, n, 0, True, B) * uniform.to(tl.float64)
    before = tl.zeros((), tl.float64)
    found = tl.full((), LAST, tl.int32)
    last = tl.zeros((), tl.int32)
    for j in tl.range(0, n, B):
        weight = tl.load(values + j + i, mask=j + i < n, other=0.0)
        mass = before + tl.cumsum(weight.to(tl.float64), 0)
        found = tl.minimum(found, tl.min(tl.where((mass > goal) & (weight > 0), j + i, LAST), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, j + i, 0), 0))
        before += tl.sum(weight.to(tl.float64), 0)
    return tl.load(ids + tl.minimum(found, last))  # `last` where rounding hid that the goal was passed


@triton.jit
def _choose(
    logits, shaped, values, ids, tokens, temperatures, top_ks, top_ps, min_ps, uniforms, stride, V,
    SHAPED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * stride
    values += r.to(tl.int64) * V
    ids += r.to(tl.int64) * V
    best, where, bad = _largest(row, V, B)
    top = tl.max(best, 0) + 0.0  # -0 and 0 are equal, but not in their bits
    if bad | (top == float("inf")) | (top == -float("inf")):
        tl.store(tokens + r, NAN)
        return
    if SHAPED:
        row = shaped + r.to(tl.int64) * V
        best, where, bad = _largest(row, V, B)
        top = tl.max(best, 0) + 0.0  # -0 and 0 are equal, but not in their bits
        if top == -float("inf"):
            tl.store(tokens + r, NOTHING)
            return
    temperature = tl.load(temperatures + r)
    if temperature == 0.0:
        tl.store(tokens + r, tl.min(tl.where(best == top, where, LAST), 0))
        return
    k = tl.load(top_ks + r)
    p = tl.load(top_ps + r).to(tl.float64)
    lightest = tl.maximum(tl.load(min_ps + r), LIGHTEST)
    least = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float64)
    if k > 0:
        if k <= B:
            least = _kth(best, k)  # as many logits at least are as large
    elif p < 1:
        total = _mass(row, V, top, temperature, lightest, B)
        # those below an equal part of the rest are outside: all of them together weigh less than the rest
        lightest = tl.maximum(lightest, ((1 - p) / V * total).to(tl.float32) * 0.9999)
    n = _gather(row, V, top, temperature, least, lightest, values, ids, B)
    if (k > 0) & (k < n):
        lowest = tl.full((), -2147483648, tl.int64)
        _truncate(values, n, top, k.to(tl.float64), lowest, -float("inf"), False, B)
    _weigh(values, n, top, temperature, B)
    if p < 1:
        if k > 0:
            total = _amount(values, n, 0, True, B)
        one = tl.full((), 1.0, tl.float32)
        _truncate(values, n, one, p * total, tl.zeros((), tl.int64), 0.0, True, B)
    tl.store(tokens + r, _draw(values, ids, n, tl.load(uniforms + r), B))


def choose(logits: Tensor, choices: Choices) -> Tensor:
    """`layers.sampling.choose`: int32 [R] on the CPU. One copy to the card, one back, which is waited for.

    Raises ValueError for lists, ids and a mask that do not fit the logits.
    """
    _check(logits, choices)
    return tokens_of(logits, moved(choices, logits.device)).cpu()


def tokens_of(logits: Tensor, choices: Choices) -> Tensor:
    """As `choose`, of choices that are on the logits' device and fit; int32 [R] there. Waits for nothing."""
    lists = (choices.bias_ids, choices.seen_ids, choices.forbidden_ids)
    is_shaped = choices.mask is not None or any(x.numel() for x in lists)
    return drawn(logits, choices, _shaped(logits, choices) if is_shaped else None)


def drawn(logits: Tensor, choices: Choices, shaped: Tensor | None = None) -> Tensor:
    """As `tokens_of`, where `shaped`, a contiguous copy, has all applied already that the lists and the mask ask
    for."""
    num_rows, width = logits.shape
    values = torch.empty(num_rows, width, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, width, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    launch(
        _choose, (num_rows,), logits, logits if shaped is None else shaped, values, ids, tokens, choices.temperature,
        choices.top_k, choices.top_p, choices.min_p, choices.uniform, logits.stride(0), width,
        shaped is not None, BLOCK,
        num_warps=16,
    )  # fmt: skip
    return tokens


def likeliest(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Likeliest:
    """`layers.sampling.likeliest`, in plain torch for all rows together; answers are on the CPU."""
    device = logits.device
    x = logits[rows.to(device).long()]
    largest = x.amax(dim=1)
    log_totals = (x - largest[:, None]).double().exp().sum(dim=1).log().float()
    ranks = (x > x.gather(1, tokens.to(device).long()[:, None])).sum(dim=1, dtype=torch.int32) + 1
    bits = (x + 0.0).view(torch.int32).long()  # -0 and 0 are equal, but not in their bits
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    places = torch.arange(x.shape[1], device=device)
    found = (order * 2**32 - places).topk(min(num_top, x.shape[1]), dim=1).indices
    return Likeliest(largest.cpu(), log_totals.cpu(), ranks.cpu(), found.int().cpu())


def _shaped(logits: Tensor, choices: Choices) -> Tensor:
    """A copy with the mask, biases, penalties and forbidden tokens applied."""
    num_rows, width = logits.shape
    shaped = torch.empty(num_rows, width, dtype=torch.float32, device=logits.device)
    words = choices.seen_ids[None] if choices.mask is None else choices.mask
    launch(
        _allowed, (num_rows, -(-width // BLOCK)), logits, shaped, words, logits.stride(0), words.stride(0), width,
        choices.mask is not None, BLOCK, num_warps=8,
    )  # fmt: skip
    launch(
        _shape, (num_rows,), shaped, choices.bias_starts, choices.bias_ids, choices.biases, choices.seen_starts,
        choices.seen_ids, choices.seen_counts, choices.forbidden_starts, choices.forbidden_ids,
        choices.repetition_penalty, choices.presence_penalty, choices.frequency_penalty, width, 1024, num_warps=4,
    )  # fmt: skip
    return shaped


def _check(logits: Tensor, choices: Choices) -> None:
    num_rows, width = logits.shape
    check(logits.dtype == torch.float32 and logits.stride(1) == 1, "logits must be float32 [R, V], rows dense", logits)
    for name, array in arrays_of(choices):
        if name.endswith("_ids"):
            starts = getattr(choices, name.removesuffix("_ids") + "_starts")
            check(starts.shape == (num_rows + 1,), f"{name[:-4]}_starts must be [{num_rows} + 1]", starts)
            fits = not array.numel() or (int(array.min()) >= 0 and int(array.max()) < width)
            check(fits and int(starts[-1]) == array.numel(), f"{name} must be from 0 to below {width}", array)
    words = (num_rows, -(-width // 32))
    if choices.mask is not None:
        check(choices.mask.shape == words, f"mask must be {list(words)}", choices.mask)
