"""How a decoder is cut over the ranks of tensor and expert parallelism; names are those of `resilin.models.decoder`.

Attention and feed-forward are cut as in Megatron-LM (Shoeybi et al., 2019, section 3): queries, keys, values, gate and
up by their outputs, whole heads to a rank; the projections back by their inputs; vocabulary by rows. Query heads that
share a key head stay together; where there are more ranks than key heads, neighbours have copies of one. Of an
adapter W + up down the matrix that has the cut side of W, `up` or `down`, is cut as W is; every rank has the other one.
"""

from __future__ import annotations

from resilin.config import UserError
from resilin.layout import Part, Shard, SpecRule
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.tensor_plan import CutNorm, LocalCount, TensorPlan

_FEED_FORWARD = r"blocks\.\d+\.(mlp|moe\.(shared|anchor|own))"
"""`anchor` and `own` are those of an expert that is trained beside a frozen model (`resilin.joined.beside`)."""
_UP, _DOWN = r"adapters\.[^.]+\.up", r"adapters\.[^.]+\.down"


def decoder_rules(settings: DecoderSettings, vocabulary_multiple: int = 1) -> list[SpecRule]:
    """What the axes `tp` and `ep` cut; lengths that do not divide differ by one (head, column or row) at most.

    Args:
        settings: of the decoder.
        vocabulary_multiple: rows of embedding and head are padded to a multiple of this.
    """
    width = settings.head_width
    queries = (Part(settings.heads * width, unit=width, rule="even", groups=settings.key_heads),)
    keys = (Part(settings.key_heads * width, unit=width, rule="even", spare="copy"),)
    pad = ((0, vocabulary_multiple),) if vocabulary_multiple > 1 else ()
    rows, columns = (Shard("tp", 0, rule="even"),), (Shard("tp", 1, rule="even"),)
    rules = [
        SpecRule(r"(embed|head)\.weight", rows, pad),
        SpecRule(r"blocks\.\d+\.attention\.q\.(weight|bias|" + _UP + ")", (Shard("tp", 0, queries),)),
        SpecRule(r"blocks\.\d+\.attention\.[kv]\.(weight|bias|" + _UP + ")", (Shard("tp", 0, keys),)),
        SpecRule(r"blocks\.\d+\.attention\.o\.(weight|" + _DOWN + ")", (Shard("tp", 1, queries),)),
        SpecRule(_FEED_FORWARD + r"\.(gate|up)\.(weight|bias|" + _UP + ")", rows),
        SpecRule(_FEED_FORWARD + r"\.down\.(weight|" + _DOWN + ")", columns),
        SpecRule(r"blocks\.\d+\.moe\.experts\.(gate|up)", (Shard("ep", 0), Shard("tp", 1, rule="even"))),
        SpecRule(r"blocks\.\d+\.moe\.experts\.down", (Shard("ep", 0), Shard("tp", 2, rule="even"))),
    ]
    if settings.qk_norm_over == "width":
        rules.append(SpecRule(r"blocks\.\d+\.attention\.q_norm\.weight", (Shard("tp", 0, queries),)))
        rules.append(SpecRule(r"blocks\.\d+\.attention\.k_norm\.weight", (Shard("tp", 0, keys),)))
    return rules


def decoder_plan(settings: DecoderSettings, vocabulary_multiple: int = 1) -> TensorPlan:
    """The plan of a decoder; the arguments are those of `decoder_rules`.

    Raises:
        UserError: its blocks have different sizes, or chains.
    """
    if settings.chains is not None:
        raise UserError(
            "chains (model.chains) cannot be divided among ranks of tensor parallelism, whose parts would be of all "
            "chains: use data or pipeline parallelism"
        )
    if settings.sizes_differ:
        raise UserError("blocks of different sizes (layer_sizes) cannot be divided among ranks of tensor parallelism")
    return TensorPlan(
        rules=tuple(decoder_rules(settings, vocabulary_multiple)),
        regions=(r"blocks\.\d+\.(attention|mlp|moe)",),
        copied=(
            r"blocks\.\d+\.attention\.(o\.bias|[qk]_norm\.weight)",
            _FEED_FORWARD + r"\.down\.bias",
            r"blocks\.\d+\.moe\.(router|shared_gate)\.(weight|bias)",
            r"blocks\.\d+\.moe\.(anchor_row|row|raw|balance_bias)",
            r"blocks\.\d+\.attention\.[qkv]\." + _DOWN,
            r"blocks\.\d+\.attention\.o\." + _UP,
            _FEED_FORWARD + r"\.(gate|up)\." + _DOWN,
            _FEED_FORWARD + r"\.down\." + _UP,
        ),
        counts=(
            LocalCount(r"blocks\.\d+\.attention", "heads", like="q.weight"),
            LocalCount(r"blocks\.\d+\.attention", "key_heads", like="k.weight"),
        ),
        biases=(r"blocks\.\d+\.attention\.o", _FEED_FORWARD + r"\.down"),
        norms=(
            CutNorm(r"blocks\.\d+\.attention\.q_norm", like="q.weight"),
            CutNorm(r"blocks\.\d+\.attention\.k_norm", like="k.weight"),
        )
        if settings.qk_norm_over == "width"
        else (),
        embedding="embed",
        head=("head.weight", "embed.weight"),
        last="norm",
        refused=("cache",),
        hints=("asked_BT",),
        padding=(("tokens_BT", 0), ("positions_BT", 0), ("documents_BT", -1), ("continues_BT", -1)),
        positions="positions_BT",
        divided="sequence",
    )
