"""overcomplete: its TopKSAE.

Its contract is dense: `encode` gives pre-codes and codes `[B, F]`, `forward` those and the reconstruction. The
selection, the decode and their gradients are sparse. So is the gradient of the codes to an encoder that is a linear
layer and a ReLU, as the default one is; that of the pre-codes is dense, and taken only where a criterion uses them.

Its rules, kept here: the encoder's ReLU comes before the top-k; in training the dictionary is normalised anew at every
use, in `eval` it is the one fused when training ended.

The host's own methods run with an encoder whose codes may be negative, since its top-k may pick those, and with a
dictionary module that is not one of its two.
"""

from __future__ import annotations

from overcomplete.sae import RelaxedArchetypalDictionary, TopKSAE
from overcomplete.sae.dictionary import DictionaryLayer
from overcomplete.sae.modules import AttentionEncoder, MLPEncoder, ResNetEncoder, TieableEncoder
from torch import Tensor, nn

from .. import SparseCodes, sparse_decode, topk_select
from .accelerated import AbstractFirst, AcceleratedModule, Candidates, has_hooks, is_plain_linear
from .sparse import candidates_of, pre_acts_at


class FastTopKSAE(AbstractFirst, AcceleratedModule, TopKSAE):
    """`TopKSAE` with a sparse decode."""

    host_class = TopKSAE

    @classmethod
    def price_obstacle(cls, obj: TopKSAE) -> str | None:
        if type(obj.encoder) not in (MLPEncoder, TieableEncoder) or not _has_relu(obj.encoder):
            return f"the encoder {type(obj.encoder).__name__}, where rows of codes that end in a ReLU are needed"
        if type(obj.dictionary) not in (DictionaryLayer, RelaxedArchetypalDictionary):
            return f"the dictionary {type(obj.dictionary).__name__}, where a matrix is needed"
        return None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_priced():
            pre_codes, codes = self.encoder(x)
            return pre_codes, self._at_price(x, codes).to_dense(codes.shape[-1])
        if not _has_relu(self.encoder):
            return super().encode(x)
        pre_codes, codes = self._encode(x)
        return pre_codes, codes.to_dense(pre_codes.shape[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._is_priced() or not (_has_relu(self.encoder) and _is_matrix(self.dictionary)):
            return super().forward(x)
        pre_codes, codes = self._encode(x)
        x_hat = sparse_decode(codes, self.dictionary.get_dictionary())
        return pre_codes, codes.to_dense(pre_codes.shape[-1]), x_hat

    def _candidates(self, k_max: int, x: Tensor, codes: Tensor | None = None) -> Candidates:
        codes = self.encoder(x)[1] if codes is None else codes
        return Candidates(candidates_of(codes, k_max), self.get_dictionary(), None, x)

    def _encode(self, x: Tensor) -> tuple[Tensor, SparseCodes]:
        linear = _linear(self.encoder, x)
        if linear is None:
            pre_codes, codes = self.encoder(x)
            return pre_codes, topk_select(codes, self.top_k)
        pre_codes, weight, bias = linear
        return pre_codes, pre_acts_at(topk_select(pre_codes.detach(), self.top_k), x, weight, bias)


def _has_relu(encoder: nn.Module) -> bool:
    """Whether the codes it makes are known not to be negative."""
    if type(encoder) in (MLPEncoder, AttentionEncoder, ResNetEncoder):
        return type(encoder.final_activation) is nn.ReLU
    return type(encoder) is TieableEncoder


def _is_matrix(dictionary: nn.Module) -> bool:
    """Whether the module multiplies by `get_dictionary()`, and nobody watches it."""
    return type(dictionary) in (DictionaryLayer, RelaxedArchetypalDictionary) and not has_hooks(dictionary)


def _linear(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """`x @ weight.T + bias`, weight and bias of an encoder that takes the ReLU of just that; None for any other."""
    if x.ndim != 2 or any(has_hooks(module) for module in encoder.modules()):
        return None
    if type(encoder) is TieableEncoder:
        weight = encoder.weight if encoder.tied_to is None else encoder.tied_to.get_dictionary()
        pre_codes = x @ weight.T
        return pre_codes if encoder.bias is None else pre_codes + encoder.bias, weight, encoder.bias
    if type(encoder) is MLPEncoder and not encoder.mlp_blocks:
        linear, *rest = encoder.final_block
        if is_plain_linear(linear) and all(type(module) is nn.Identity for module in rest):
            pre_codes = linear(x)
            # Under autocast a linear layer rounds its bias, too.
            return pre_codes, linear.weight, None if linear.bias is None else linear.bias.to(pre_codes.dtype)
    return None
