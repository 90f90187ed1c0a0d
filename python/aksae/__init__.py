"""AdaptiveK sparse autoencoders on language models: activations, training, evaluation and reports.

`fit(SAE(SAEConfig(...)), batches, FitConfig(...))` trains an SAE on activations; `train(TrainConfig(...))` does a whole
run of AdaptiveK, from text to report.
"""

from .errors import UserError, missing_module

try:
    import numpy  # noqa: F401 - first: where it is missing torch warns, before our line could say so

    from aksae_kernels import __version__

    from .config import LabelConfig, ModelConfig, SAEConfig, TextConfig, TrainConfig
    from .fit import FitConfig, FitResult, fit
    from .intervene import Scale, Set, intervene
    from .k_policy import KMap
    from .pricing import adapt, calibrate
    from .reading import Activations, open_activations
    from .sae import SAE, AdaptiveKSAE
    from .selections import AdaptiveK, BatchTopK, JumpReLU, Matryoshka, Need, Priced, TopK
    from .train import TrainResult, train
except ModuleNotFoundError as error:
    raise missing_module(error) from None

__all__ = [
    "SAE",
    "Activations",
    "AdaptiveK",
    "AdaptiveKSAE",
    "BatchTopK",
    "FitConfig",
    "FitResult",
    "JumpReLU",
    "KMap",
    "LabelConfig",
    "Matryoshka",
    "ModelConfig",
    "Need",
    "Priced",
    "SAEConfig",
    "Scale",
    "Set",
    "TextConfig",
    "TopK",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "__version__",
    "adapt",
    "calibrate",
    "fit",
    "intervene",
    "open_activations",
    "train",
]
