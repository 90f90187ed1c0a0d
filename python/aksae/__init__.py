"""AdaptiveK sparse autoencoders on language models: labels, probe, three-phase training, evaluation and reports.

`train(TrainConfig(...))` does a whole run; `AdaptiveKSAE` is the model alone.
"""

from .config import LabelConfig, ModelConfig, SAEConfig, TextConfig, TrainConfig
from .errors import UserError
from .sae import AdaptiveKSAE
from .train import TrainResult, train

__all__ = [
    "AdaptiveKSAE",
    "LabelConfig",
    "ModelConfig",
    "SAEConfig",
    "TextConfig",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "train",
]
