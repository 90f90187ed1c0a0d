"""What an SAE of this package must be for a host to hold it."""

from __future__ import annotations

from ..errors import UserError
from ..sae import SAE
from ..selections import AdaptiveK


def require_unscaled(sae: SAE) -> None:
    """Raise UserError unless `sae` reconstructs its input, `x_hat = W_dec z + b_dec`."""
    config = sae.config
    if config.transcoder:
        raise UserError("sae: got a transcoder, needs an autoencoder")
    for name in ("input_scale", "output_scale"):
        if (scale := getattr(config, name)) != 1:
            raise UserError(
                f"sae: got {name} = {scale:.6g}, needs 1: the host knows no scale; aksae.formats folds it into weights"
            )


def adaptive_selection(sae: SAE) -> AdaptiveK:
    """The selection of `sae`. Raises UserError for another than AdaptiveK, a transcoder, or scaled activations."""
    selection = sae.config.selection
    if not isinstance(selection, AdaptiveK):
        raise UserError(f"sae: got {selection}, needs AdaptiveK, with a probe")
    require_unscaled(sae)
    return selection
