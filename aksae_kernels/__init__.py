"""Variable-k top-k encoding and sparse decoding for sparse autoencoders, as torch custom ops with several backends."""

from .codes import SparseCodes
from .dispatch import available_backends, use_backend
from .kept import frozen
from .ops import (
    batch_topk_encode,
    batch_topk_select,
    decode_mse,
    encode_at,
    explain,
    price_select,
    sparse_decode,
    sparse_encode,
    sparse_value_grad,
    sparse_weight_grad,
    threshold_encode,
    threshold_select,
    topk_encode,
    topk_select,
)
from .pricing import price_for

__version__ = "0.1.0"

__all__ = [
    "SparseCodes",
    "available_backends",
    "batch_topk_encode",
    "batch_topk_select",
    "decode_mse",
    "encode_at",
    "explain",
    "frozen",
    "price_for",
    "price_select",
    "sparse_decode",
    "sparse_encode",
    "sparse_value_grad",
    "sparse_weight_grad",
    "threshold_encode",
    "threshold_select",
    "topk_encode",
    "topk_select",
    "use_backend",
]
