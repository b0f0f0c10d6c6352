"""A Llama-family decoder.

Shapes: B batch, T tokens, D hidden size, E experts, V vocabulary.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from resilin.keys import Keys, drop
from resilin.models.block import Block
from resilin.models.cache import KVCache
from resilin.models.chain_freeze import freeze_chains
from resilin.models.chain_modules import ChainEmbedding, ChainHead, chain_kept, first_part, matrix_of, scale_logits
from resilin.models.cut import Cut, cut_of
from resilin.models.decoder_plan import decoder_plan
from resilin.models.decoder_settings import DecoderSettings
from resilin.models.given import Given, check_given
from resilin.models.groups import Groups
from resilin.models.initial import fill_parameters
from resilin.models.linear import Embedding, Linear, PackedWeight, product
from resilin.models.loop import LoopCondition
from resilin.models.mask import LARGEST, Mask, cached_mask, flex_mask, rule_mask, span_masks, training_mask
from resilin.models.norm import stream_norm
from resilin.models.offload import Offload, store_for
from resilin.models.recompute import run_block
from resilin.models.rope import depends_on_length, rotation
from resilin.models.row_states import RowStates
from resilin.models.sequence_part import SequencePart
from resilin.models.spans import asked_places, runs_of
from resilin.models.stage_span import Hidden, StageOutput, StageShape, StageSpan
from resilin.models.tensor_plan import TensorPlan

_WORTH_LEAVING_OUT = 0.02  # share of all places that must be saved


class DecoderOutput(NamedTuple):
    """What a decoder gives for a batch of tokens.

    Attributes:
        hidden_BTD: after the final norm; `Decoder.logits` turns it (or a chunk of it) into logits.
        router_logits: (B, T, E) of every block that has experts, in order.
        choices: how many experts a token visited in each of those blocks; (): as many as the settings say.
    """

    hidden_BTD: Tensor
    router_logits: tuple[Tensor, ...] = ()
    choices: tuple[int, ...] = ()


@cache
def _takes_keys(kind: type[nn.Module]) -> bool:
    return "keys" in inspect.signature(kind.forward).parameters


def _more(cut: Cut | None, layer: int, told_D: Tensor | None, *of_cache: Any) -> tuple[Any, ...]:
    """A block's further arguments: its part of the cache, its cut and what it is told, as far as there are any."""
    arguments = (*of_cache, None if cut is None else cut.blocks[layer], told_D)
    while arguments and arguments[-1] is None:
        arguments = arguments[:-1]
    return arguments


def _unchanged(_: int, x_BTD: Tensor) -> Tensor:
    return x_BTD


def _length(positions_BT: Tensor, documents_BT: Tensor | None) -> int:
    """One more than the largest position of a token that is no padding."""
    in_use = positions_BT if documents_BT is None else positions_BT.where(documents_BT >= 0, 0)
    return int(in_use.max()) + 1


class Decoder(nn.Module):
    """A decoder-only transformer. Built by `DecoderSettings.build`.

    Attributes:
        settings: what it was built from; `vocab_size` is never 0 here.
        leaves_out_unasked: its forward pass takes `asked_BT`.
        sequence: where rows are divided over ranks, which of their tokens this one computes; None: all of them.
        span: where blocks are divided over stages, which of them are here; None: all of them.
    """

    leaves_out_unasked = True
    block_kind: ClassVar[type[nn.Module]] = Block
    indivisible: str | None = None
    """Why its blocks and rows cannot be divided over ranks; None: they can."""
    sequence: SequencePart | None = None
    span: StageSpan | None = None

    def __init__(
        self, settings: DecoderSettings, *, seed: int | None = 0, device: torch.device | str | None = None
    ) -> None:
        """Args:
        settings: of the decoder.
        seed: of the initial weights; None leaves the memory unfilled, for a loader.
        device: where the parameters live ("meta" allocates nothing).
        """
        super().__init__()
        if not settings.vocab_size:
            raise ValueError("a Decoder needs settings.vocab_size: it is 0")
        self.settings = settings
        chains = settings.widths.hidden if settings.chains is not None else ()
        self.embed: Embedding | ChainEmbedding
        if chains:
            self.embed = ChainEmbedding(settings.vocab_size, chains, device)
        else:
            self.embed = Embedding(settings.vocab_size, settings.hidden_size, device=device)
        self.blocks = nn.ModuleList(self.block_kind(settings, layer, device) for layer in range(settings.layers))
        self.norm = stream_norm(settings, device)
        self.loop = LoopCondition(settings, device) if settings.told else None
        self.head: Linear | ChainHead | None = None
        if not settings.tie_embeddings:
            if chains:
                self.head = ChainHead(settings.vocab_size, chains, device)
            else:
                self.head = Linear(settings.hidden_size, settings.vocab_size, bias=False, device=device)
        if seed is not None:
            fill_parameters(self, settings, seed)
        if settings.chains is not None:
            freeze_chains(self, settings.chains)

    @property
    def _chained(self) -> bool:
        return self.settings.chains is not None

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output matrix, the embedding's own where they are tied; of a cut model the columns in use."""
        table, cut = self.embed if self.head is None else self.head, cut_of(self)
        if isinstance(table, ChainEmbedding | ChainHead):
            return matrix_of(table, self.settings.hidden_size if cut is None else cut.hidden)
        return table.weight if cut is None else self._columns(table.weight, cut)

    @property
    def stream_dtype(self) -> torch.dtype:
        """The format of the residual stream: that of the norms, whatever format the matrices are stored in."""
        norm = self.norm if self.span is None else self.blocks[self.span.blocks[0]].attention_norm
        dtype: torch.dtype = first_part(norm).weight.dtype  # type: ignore[assignment, arg-type]
        return dtype

    @property
    def _sample(self) -> Tensor:
        """A matrix that is like all others in device and format."""
        if self.span is None or self.span.first:
            return first_part(self.embed).weight  # type: ignore[return-value]
        return next(p for p in self.blocks[self.span.blocks[0]].parameters() if p.ndim > 1)

    @staticmethod
    def _columns(x: Tensor, cut: Cut | None) -> Tensor:
        """The part of the stream's width that is in use."""
        return x if cut is None or cut.hidden == x.shape[-1] else x[..., : cut.hidden]

    def _embedded(self, tokens_BT: Tensor, cut: Cut | None) -> Tensor:
        whole = self.embed(tokens_BT, cut.hidden) if cut is not None and self._chained else self.embed(tokens_BT)
        x_BTD = self._columns(whole.to(self.stream_dtype), cut)
        return x_BTD if cut is None else cut.embedded(x_BTD)

    def _last_norm(self, x_BTD: Tensor, cut: Cut | None) -> Tensor:
        masked = None if cut is None else cut.last_norm(x_BTD, self.norm)
        if masked is not None:
            return masked
        if x_BTD.shape[-1] == self.settings.hidden_size or self._chained:
            whole: Tensor = self.norm(x_BTD)
            return whole
        part: Tensor = self.norm(x_BTD, self._columns(self.norm.weight, cut))  # type: ignore[arg-type]
        return part

    def _choices(self, cut: Cut | None) -> tuple[int, ...]:
        """How many experts a token visits in each block with experts that is computed; () where that is as ever."""
        if self.settings.moe is None or (cut is None and not self.settings.layer_sizes):
            return ()
        found = []
        for layer in range(self.settings.layers):
            moe = self.settings.at(layer).moe
            if moe is None or not self.settings.is_moe_layer(layer) or (cut is not None and layer in cut.skipped):
                continue
            of_block = None if cut is None else cut.blocks[layer]
            found.append((of_block.experts_per_token if of_block is not None else 0) or moe.experts_per_token)
        return tuple(found) * len(self._trajectory(cut))

    def _router_widths(self, cut: Cut | None) -> tuple[int, ...]:
        """How many experts may be chosen in each block; 0 where there are none, or the block is passed by."""
        found = []
        for layer in range(self.settings.layers):
            moe = self.settings.at(layer).moe if self.settings.is_moe_layer(layer) else None
            if moe is None or (cut is not None and layer in cut.skipped):
                found.append(0)
                continue
            of_block = None if cut is None else cut.blocks[layer]
            kept = None if of_block is None else of_block.experts
            found.append(moe.experts if kept is None else len(kept))
        return tuple(found)

    def _trajectory(self, cut: Cut | None) -> tuple[int, ...]:
        return self.settings.trajectory if cut is None else cut.trajectory or self.settings.trajectory

    @property
    def trajectory(self) -> tuple[int, ...]:
        """The steps of the loops that this thread now runs, in any proportion; (1,) where it is not looped."""
        return self._trajectory(cut_of(self))

    def _told(self, cut: Cut | None) -> list[Tensor | None]:
        """What blocks are told in each loop: (D,), or nothing."""
        trajectory = self._trajectory(cut)
        if self.loop is None:
            return [None] * len(trajectory)
        width = self.settings.hidden_size if cut is None else cut.hidden
        return list(self.loop(trajectory, width, self.stream_dtype))

    def logits(self, hidden: Tensor, head: PackedWeight | None = None) -> Tensor:
        """(..., D) after the final norm -> (..., V) logits, float32 at least, soft-capped where the settings say so.

        Args:
            hidden: after the final norm.
            head: the head's weight, packed, where many products follow each other.
        """
        table = self.embed if self.head is None else self.head
        if head is not None:
            logits = head(hidden)
        elif isinstance(table, ChainEmbedding | ChainHead):
            *_, logits = scale_logits(table, hidden)
        else:
            logits = product(hidden, self.head_weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.settings.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def row_states(self, batch: int) -> RowStates | None:
        """What recurrent layers remember of rows that have no token yet; None: there are none."""
        return None

    def tensor_plan(self, vocabulary_multiple: int = 1) -> TensorPlan:
        """How it is cut over the ranks of tensor parallelism; see `resilin.parallel.tensor`."""
        return decoder_plan(self.settings, vocabulary_multiple)

    @property
    def attends_by_document(self) -> bool:
        """Whether attention over packed rows is now computed document by document, as training on CPUs does.

        Rows of any lengths may then be laid one behind another at no cost.
        """
        settings, weight = self.settings, self._sample
        return (
            not torch.compiler.is_compiling()
            and weight.device.type == "cpu"
            and weight.dtype == self.stream_dtype
            and weight.dtype in (torch.float32, torch.float64)
            and settings.attention_backend == "sdpa"
            and not torch.is_autocast_enabled("cpu")
            and not any(block._compiled_call_impl is not None for block in self.blocks)  # stretches change every step
            and not torch._C._are_functorch_transforms_active()
        )

    @property
    def draws(self) -> bool:
        """Whether random numbers are, or may be, drawn while it computes: its own dropout, or a foreign module's."""
        for module in self.modules():
            kind: Any = type(module)
            rate: float = getattr(getattr(module, "settings", None), "dropout", 0.0)
            if rate or (not isinstance(module, (Decoder, self.block_kind)) and _takes_keys(kind)):
                return True
        return False

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        keys: Keys | None = None,
        cache: KVCache | None = None,
        continues_BT: Tensor | None = None,
        asked_BT: Tensor | None = None,
        given: Given | None = None,
    ) -> DecoderOutput | StageOutput:
        """Args:
        tokens_BT: ids.
        positions_BT: where each token stands in its text; None: 0, 1, 2, ... (after what the cache holds). (B, T, 3)
            of time, height and width are taken too (`resilin.models.rope.rotation`).
        documents_BT: attention stays among equal numbers; -1 marks padding. With a cache only padding counts.
        keys: for dropout; None (evaluation): no dropout.
        cache: read and extended by these tokens.
        continues_BT: the number of the document, earlier in the row, that a token's document goes on from: all of it
            is seen as well; -1: none.
        asked_BT: the places whose hidden states are wanted. Where it saves work, those behind the last one of a
            document are left out, and are zeros.
        given: what a model around this one has decided in its place: see `resilin.models.given`.

        Returns:
            The output; where blocks are divided over stages, what the span has in its place.
        """
        if given is not None:
            check_given(self, cache)
            return self._forward_all(tokens_BT, positions_BT, documents_BT, keys, continues_BT, given)
        if cache is not None:
            if continues_BT is not None:
                raise ValueError("documents that go on from others (continues_BT) cannot be read over a cache")
            if self.sequence is not None:
                raise ValueError(
                    "a decoder whose rows are divided over ranks cannot read a cache: use an undivided one"
                )
            return self._forward_cached(tokens_BT, positions_BT, documents_BT, cache)
        if asked_BT is not None and continues_BT is None and self._may_leave_out:
            places_N = asked_places(documents_BT, asked_BT)
            worth = 0 < len(places_N) <= (1 - _WORTH_LEAVING_OUT) * asked_BT.numel()
            if worth and (keys is None or not self.draws):  # random numbers go by the rows as they are
                return self._forward_some(tokens_BT, positions_BT, documents_BT, keys, places_N)
        return self._forward_all(tokens_BT, positions_BT, documents_BT, keys, continues_BT)

    @property
    def _may_leave_out(self) -> bool:
        # Routers are judged by all real tokens; scaled rotations go by the rows as they are. Ranks that share a row
        # compute equally many places of it.
        plain = self.settings.moe is None and not depends_on_length(self.settings) and self.sequence is None
        return plain and self.attends_by_document

    def _forward_some(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | None,
        keys: Keys | None,
        places_N: Tensor,
    ) -> DecoderOutput | StageOutput:
        """The places `places_N` of all rows, laid one behind another; the others' hidden states are zeros."""
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = torch.arange(T, device=tokens_BT.device).expand(B, T)
        if documents_BT is None:
            documents_BT = torch.arange(B, device=tokens_BT.device)[:, None].expand(B, T)
        runs_N = runs_of(documents_BT)
        tokens, positions, documents = (
            x.flatten().index_select(0, places_N)[None] for x in (tokens_BT, positions_BT, runs_N)
        )
        output = self._forward_all(tokens, positions, documents, keys, None)
        if not isinstance(output, DecoderOutput):
            return output
        hidden_ND = output.hidden_BTD[0]
        hidden_BTD = hidden_ND.new_zeros(B * T, hidden_ND.shape[1]).index_copy(0, places_N, hidden_ND)
        return DecoderOutput(hidden_BTD.view(B, T, -1))

    def masks_of(
        self,
        documents_BT: Tensor | None,
        positions_BT: Tensor | None,
        continues_BT: Tensor | None,
        tokens: int,
        device: torch.device,
        groups: Groups | None = None,
    ) -> dict[int | None, Mask]:
        """The mask of every window that a layer has, over whole rows of `tokens` tokens."""
        settings = self.settings
        windows = {settings.window_of(layer) for layer in range(settings.layers)}
        if self.sequence is not None and self.sequence.in_pieces:
            return {w: rule_mask(documents_BT, tokens, w, continues_BT, positions_BT) for w in windows}
        masks: dict[int | None, Mask] = {}
        if documents_BT is not None and groups is None and self.attends_by_document:
            masks = span_masks(documents_BT, windows, continues_BT)
        # torch has no backward pass of flex attention on CPUs, and the forward pass makes all logits: there the same
        # mask goes to another backend.
        batch = 1 if documents_BT is None else len(documents_BT)
        batch = batch if groups is None else len(groups.ends_BT)
        other = device.type == "cpu" and (torch.is_grad_enabled() or batch * tokens**2 > LARGEST)
        flex = settings.attention_backend == "flex" and not other
        make_mask = flex_mask if flex else training_mask
        rest = windows - masks.keys()
        return masks | {w: make_mask(documents_BT, tokens, w, device, continues_BT, positions_BT, groups) for w in rest}

    def _forward_all(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | None,
        keys: Keys | None,
        continues_BT: Tensor | None,
        given: Given | None = None,
    ) -> DecoderOutput | StageOutput:
        cut = cut_of(self)
        if self.span is not None and self.span.probing:
            rows, tokens = tokens_BT.shape
            width = self.settings.hidden_size if cut is None else cut.hidden
            return StageShape(rows, tokens, width, self._router_widths(cut))
        T, device = tokens_BT.shape[1], tokens_BT.device
        # What attention sees are whole rows, also where the tokens of a row are divided over ranks.
        rows, whole = T, (documents_BT, positions_BT, continues_BT)
        if self.sequence is not None:
            rows, whole = self.sequence.ranks * T, self.sequence.whole(*whole)
            keys = keys.within(self.sequence.places(T, device)) if keys is not None else None
        length = rows
        if positions_BT is None:
            positions = torch.arange(T, device=device) if self.sequence is None else self.sequence.places(T, device)
        else:
            positions = positions_BT
            if depends_on_length(self.settings):
                length = _length(cast(Tensor, whole[1]), whole[0])
        turn = rotation(self.settings, positions, length)
        masks = self.masks_of(*whole, rows, device, None if given is None else given.groups)
        if self.span is not None:
            self.span.tokens = tokens_BT
        if self.span is None or self.span.first:
            if given is not None and given.embedded_BTD is not None:
                x_BTD = given.embedded_BTD.to(self.stream_dtype)
            elif self.span is None:
                x_BTD = self._embedded(tokens_BT, cut)
            else:
                x_BTD = self._columns(self.span.begin(tokens_BT, self.embed).to(self.stream_dtype), cut)
            if keys is not None and self.settings.dropout:
                sizes = self.settings.widths.hidden if self._chained else (x_BTD.shape[-1],)
                keep_BTD = chain_kept(x_BTD, self.settings.dropout, keys.fold("embed"), sizes)
                x_BTD = drop(x_BTD, self.settings.dropout, keep_BTD)
            routers = []
        else:
            before = self.span.take()
            x_BTD, routers = before.hidden_BTD, list(before.router_logits)
        store = store_for(self.settings.offload, device)
        offload = Offload(store) if store is not None else None
        layers = range(self.settings.layers) if self.span is None else self.span.blocks
        told, after = self._told(cut), given.after if given is not None else _unchanged
        for loop, told_D in enumerate(told):
            own = keys.fold("loop").fold(loop) if keys is not None and loop else keys
            for layer in layers:
                if cut is not None and layer in cut.skipped:
                    x_BTD = after(layer, x_BTD)
                    continue
                mask, last = masks[self.settings.window_of(layer)], loop == len(told) - 1 and layer == layers[-1]
                before_BTD = x_BTD
                x_BTD, router = run_block(
                    self.settings.recompute,
                    self.blocks[layer],
                    x_BTD,
                    turn,
                    mask,
                    own,
                    *_more(cut, layer, told_D, None, None),
                    offload=None if last else offload,
                )
                x_BTD = x_BTD if cut is None else cut.passed(layer, before_BTD, x_BTD)
                if router is not None:
                    routers.append(router)
                x_BTD = after(layer, x_BTD)
        if self.span is not None and not self.span.last:
            return Hidden(x_BTD, tuple(routers))
        return DecoderOutput(self._last_norm(x_BTD, cut), tuple(routers), self._choices(cut))

    def _forward_cached(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, documents_BT: Tensor | None, cache: KVCache
    ) -> DecoderOutput:
        T, cut = tokens_BT.shape[1], cut_of(self)
        real_BT = None if documents_BT is None else documents_BT >= 0
        slots_BT = cache.slots_of(real_BT, T)
        reach = min(cache.reach + T, cache.capacity)
        positions = slots_BT if positions_BT is None else positions_BT
        length = reach
        if depends_on_length(self.settings):
            length = _length(positions, documents_BT)
        turn = rotation(self.settings, positions, length)
        ragged = cache.ragged or real_BT is not None
        windows = {self.settings.window_of(layer) for layer in range(self.settings.layers)}
        masks = {window: cached_mask(slots_BT, reach, ragged, window) for window in windows}
        x_BTD = self._embedded(tokens_BT, cut)
        routers = []
        cache.begin_loop(0, of=len(self._trajectory(cut)))
        if isinstance(self.embed, ChainEmbedding) and not self.settings.shares_keys:
            cache.begin_chains(self.embed.scale_of(x_BTD.shape[-1]))
        told_as = (self._trajectory(cut), self.settings.hidden_size if cut is None else cut.hidden)
        told = cache.once(told_as, partial(self._told, cut))
        for loop, told_D in enumerate(told):
            cache.begin_loop(loop, of=len(told))
            for layer, block in enumerate(self.blocks):
                if cut is not None and layer in cut.skipped:
                    continue
                mask = masks[self.settings.window_of(layer)]
                more, before_BTD = _more(cut, layer, told_D, cache, slots_BT), x_BTD
                x_BTD, router = block(x_BTD, turn, mask, None, *more, *(() if told_D is None else (told_as,)))
                x_BTD = x_BTD if cut is None else cut.passed(layer, before_BTD, x_BTD)
                if router is not None:
                    routers.append(router)
        cache.advance(real_BT, T)
        return DecoderOutput(self._last_norm(x_BTD, cut), tuple(routers), self._choices(cut))
