"""AdaptiveK sparse autoencoders on language models: labels, probe, three-phase training, evaluation and reports.

`train(TrainConfig(...))` does a whole run; `AdaptiveKSAE` is the model alone.
"""

from .errors import UserError, missing_module

try:
    import numpy  # noqa: F401 - first: where it is missing torch warns, before our line could say so

    from aksae_kernels import __version__

    from .config import LabelConfig, ModelConfig, SAEConfig, TextConfig, TrainConfig
    from .sae import AdaptiveKSAE
    from .train import TrainResult, train
except ModuleNotFoundError as error:
    raise missing_module(error) from None

__all__ = [
    "AdaptiveKSAE",
    "LabelConfig",
    "ModelConfig",
    "SAEConfig",
    "TextConfig",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "__version__",
    "train",
]
