"""muP-style scaling of learning rates with width.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023, section 3.2.4
and appendix: the learning rate of each linear layer, the head included, is multiplied by (its fan-in in a model of
the base width) / (its fan-in), so the best learning rate stays the same as the model widens. The fan-ins of a decoder
(hidden size, heads together, feed-forward) grow in proportion, so that factor is base width / width for all of them.
The stronger variants change the model, which has settings for them: see `scaled_model`.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from resilin.models.chain_linear import Chained
from resilin.models.decoder_settings import DecoderSettings
from resilin.optim.groups import embedding_names, is_vector

Level = Literal["simple", "intermediate", "full"]


def learning_rate_scales(model: nn.Module, base_width: int) -> dict[str, float]:
    """The factor of each linear layer's learning rate: base_width / width, by parameter name.

    The width is that of the model's embedding. Matrices and stacks of them (experts) are linear layers; embeddings
    (also where the head shares the table), norms and biases are not named: their learning rate stays. At the base
    width every factor is exactly 1.

    Raises:
        ValueError: for a model without an `nn.Embedding`, whose width is unknown, or one of chains.
    """
    if any(isinstance(module, Chained) for module in model.modules()):
        raise ValueError(
            "mup_base_width is not defined for chains (model.chains), whose fan-ins grow from chain to chain: leave it "
            "out"
        )
    width = next((m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if width is None:
        raise ValueError("mup_base_width needs a model with an nn.Embedding, whose dimension is the model's width")
    embeddings = embedding_names(model)
    return {
        name: base_width / width
        for name, parameter in model.named_parameters()
        if not is_vector(name, parameter) and name not in embeddings
    }


def scaled_model(settings: DecoderSettings, level: Level, base_width: int = 256) -> DecoderSettings:
    """A decoder's settings for a level of muParam; the optimizer's `mup_base_width` goes with every level.

    simple: as it is. intermediate: the head starts with standard deviation sqrt(base_width) / fan_in. full: also
    attention scale 1 / head size, and queries that start at zero.
    """
    if level == "simple":
        return settings
    changes: dict[str, object] = {"mup_base_size": base_width}
    if level == "full":
        changes |= {"attention_scale": 1 / settings.head_width, "zero_query_init": True}
    return settings.model_copy(update=changes)
