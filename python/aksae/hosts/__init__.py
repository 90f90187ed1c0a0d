"""AdaptiveK inside other SAE codebases: one module per host, imported only by those who have it.

`sae_lens`: the architecture `adaptivek`. `dictionary_learning`: a `dict_class`. `sae_bench`: an adapter for its
evaluations. `latent_cache`: the files delphi explains latents from, written without a dense activation.
"""
