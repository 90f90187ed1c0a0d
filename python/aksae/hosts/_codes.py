"""The decode of the dense tensors that hosts hold latents in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from aksae_kernels import SparseCodes, sparse_decode

# With a larger share of active latents, gathering their rows of the decoder has little to win over the dense product.
_SPARSE_SHARE = 1 / 8


def decode_dense(acts: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """`acts @ W_dec + b_dec` of `acts [..., F]`, from the codes that the data holds wherever few latents are active.

    The codes are read off `acts` itself, so edits between encode and decode count. The product is dense where many
    entries are not 0, where `acts` has no data to tell (meta and fake tensors), and where it is differentiated, in
    either mode: zero entries have derivatives too. Deciding reads `acts`, and waits for an accelerator.
    """
    is_differentiated = (torch.is_grad_enabled() and acts.requires_grad) or unpack_dual(acts).tangent is not None
    has_data = not (acts.is_meta or isinstance(acts, torch._subclasses.FakeTensor))
    if not has_data or is_differentiated or int(acts.count_nonzero()) > acts.numel() * _SPARSE_SHARE:
        return F.linear(acts, W_dec.T, b_dec)
    return sparse_decode(SparseCodes.from_dense(acts), W_dec, b_dec)
