"""What a backend may keep of a weight between calls, as long as the caller promises that it does not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Kept(threading.local):
    """What this thread keeps: by place and shape of a frozen weight, its version and what was made of it.

    Each thread has its own, since a promise that one thread makes is no other's: a thread that leaves `frozen` takes
    nothing from one that is inside, and nothing stays behind of one that was preparing a weight meanwhile.
    """

    def __init__(self) -> None:
        self.weights: dict[tuple, tuple[int | None, Any] | None] = {}


_kept = _Kept()


@contextmanager
def frozen(*weights: Tensor) -> Iterator[None]:
    """Within it, `topk_encode` may keep what it prepares of these encoder weights, where it else would in every call.

    On CPUs with bf16 units and on `triton` an fp32 encode first rounds `W_enc` to bf16 and takes norms of its rows: on
    CPUs some 10 % of the time of an encode of 1024 rows, half of that of 64 rows. Under `frozen(W_enc)` it is done
    once, for `2 F D` bytes:

        with torch.no_grad(), aksae_kernels.frozen(W_enc):
            for x in batches:
                codes = topk_encode(x, W_enc, b_enc, k=k)

    Results are the same bits. A change that torch's version counter sees (any in-place operation, an optimizer step)
    is noticed, and the weight prepared anew. Writes past the counter, through `.data`, NumPy or a kernel of one's own,
    are not: they break the promise, and selections may then miss winners. That is why nothing is kept unasked. Other
    backends and dtypes prepare nothing. It holds for the calls of the thread that enters it, and each thread prepares a
    weight of its own; entering it twice for a weight is no error. On a GPU, all calls must be on one stream; while a
    CUDA graph is captured nothing is kept or used.
    """
    kept = _kept.weights
    # With their memory, so that no other tensor is found in its place where a weight's data is replaced meanwhile.
    ours = {_key(weight): weight.untyped_storage() for weight in weights if _key(weight) not in kept}
    kept.update(dict.fromkeys(ours))
    try:
        yield
    finally:
        for key in ours:
            kept.pop(key, None)


def prepared(weight: Tensor, prepare: Callable[[Tensor], Any]) -> Any | None:
    """What `prepare` makes of a frozen weight, kept from an earlier call where it is still right; else None."""
    key, ours = _key(weight), _kept.weights
    if key not in ours:
        return None
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph may outlive what is kept, and what it would prepare is not computed until it is replayed.
        return None
    version = None if weight.is_inference() else weight._version
    kept = ours[key]
    if kept is None or kept[0] != version:
        kept = ours[key] = version, prepare(weight)
    return kept[1]


def _key(weight: Tensor) -> tuple:
    return weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, weight.device
