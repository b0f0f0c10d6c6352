"""muP-style scaling of learning rates with width.

Source: Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023, section 3.2.4
and appendix: the learning rate of each linear layer, the head included, is multiplied by base fan-in / fan-in, so the
best learning rate stays the same as the model widens. The stronger variants change the model, which has settings for
them: see `scaled_model`.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from resilin.models.decoder_settings import DecoderSettings
from resilin.optim.groups import embedding_names, is_vector

Level = Literal["simple", "intermediate", "full"]


def learning_rate_scales(model: nn.Module, base_width: int) -> dict[str, float]:
    """The factor of each linear layer's learning rate: base_width / fan_in, by parameter name.

    Matrices, and stacks of them (experts), have their fan-in last. Embeddings (also where the head shares the table),
    norms and biases are not named: their learning rate stays. At fan_in == base_width the factor is exactly 1.
    """
    embeddings = embedding_names(model)
    return {
        name: base_width / parameter.shape[-1]
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
