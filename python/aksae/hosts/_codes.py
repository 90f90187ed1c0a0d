"""The decode of the dense tensors that hosts hold latents in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from aksae_kernels import SparseCodes, sparse_decode, topk_select

# With a larger share of active latents, gathering their rows of the decoder has little to win over the dense product.
_SPARSE_SHARE = 1 / 8


def decode_dense(acts: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """`acts @ W_dec + b_dec` of `acts [..., F]`, from the codes that the data holds wherever few latents are active.

    The codes are read off `acts` itself, so edits between encode and decode count. The product is dense where a row
    has a negative entry, or too many active ones, where `acts` has no data to tell (meta and fake tensors), and where
    it is differentiated, in either mode: zero entries have derivatives too. Deciding reads `acts` once, and waits for
    an accelerator.
    """
    is_differentiated = (torch.is_grad_enabled() and acts.requires_grad) or unpack_dual(acts).tangent is not None
    has_data = not (acts.is_meta or isinstance(acts, torch._subclasses.FakeTensor))
    codes = _codes_of(acts) if has_data and not is_differentiated else None
    if codes is None:
        return F.linear(acts, W_dec.T, b_dec)
    return sparse_decode(codes, W_dec, b_dec)


def _codes_of(acts: Tensor) -> SparseCodes | None:
    """The non-zero entries of `acts [..., F]`; None where one is negative or a row has too many."""
    n_active = acts.count_nonzero(-1)
    width = int(n_active.max()) if n_active.numel() else 0
    if width > acts.shape[-1] * _SPARSE_SHARE:
        return None
    codes = topk_select(acts, width)
    return codes if bool((codes.counts == n_active).all()) else None
