"""A stage of a pipeline: the part of a model that it is, and what comes in and goes out.

Shapes: B rows, T tokens, D hidden size, E experts, W values of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resilin.models.decoder import Decoder
from resilin.models.stage_span import Elsewhere, Hidden, StageOutput, StageShape, StageSpan
from resilin.parallel.errors import ParallelError
from resilin.parallel.pipeline.split import Split


def decoder_in(model: nn.Module) -> Decoder:
    """The decoder inside a model that a pipeline is to divide.

    Raises:
        ParallelError: there is none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, Decoder)]
    if len(found) != 1:
        raise ParallelError(
            f"a pipeline divides the blocks of a Decoder, but this {type(model).__name__} has {len(found)} of them: "
            "use parallel.pipeline = 1"
        )
    if found[0].indivisible is not None:
        raise ParallelError(f"{found[0].indivisible}: use parallel.pipeline = 1")
    return found[0]


@dataclass(frozen=True)
class Width:
    """How a row of the payload between two stages is laid out: the residual stream, then the router logits.

    Attributes:
        tokens: T, of this rank.
        hidden: D.
        routers: of each block with experts before the boundary, how many may be chosen.
        router_tokens: tokens that router logits have; the same but where sequences are divided for tensor parallelism.
        dtype: of the payload.
    """

    tokens: int
    hidden: int
    routers: tuple[int, ...]
    router_tokens: int
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """W."""
        return self.tokens * self.hidden + self.router_tokens * sum(self.routers)

    def pack(self, sent: Hidden) -> Tensor:
        """(B, W)."""
        parts = [sent.hidden_BTD, *sent.router_logits]
        flat = [part.flatten(1).to(self.dtype) for part in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unpack(self, payload_BW: Tensor) -> Hidden:
        """The other way; views where it can be."""
        B = len(payload_BW)
        sizes = [self.tokens * self.hidden, *(self.router_tokens * experts for experts in self.routers)]
        hidden, *routers = payload_BW.split(sizes, 1)
        logits = [
            router.reshape(B, self.router_tokens, experts)
            for router, experts in zip(routers, self.routers, strict=True)
        ]
        return Hidden(hidden.reshape(B, self.tokens, self.hidden), tuple(logits))


class _StageDone(Exception):  # noqa: N818 - not an error: it leaves the objective, whose model ends elsewhere
    """Raised once the decoder has given something that is no output of the whole model."""

    def __init__(self, output: StageOutput) -> None:
        super().__init__("this stage is done")
        self.output = output


class Stage:
    """One stage on this rank.

    The objective calls its model as ever, and is left by an exception once the decoder is done: from a hook that runs
    after all others, so that whoever else hooked the decoder (FSDP) sees a call that ends.

    Args:
        number: of the stage.
        module: the model with this stage's parts only, made by `cut`; whatever hooks its decoder has done so.
        sequence_ranks: among how many ranks tensor parallelism divides the tokens between blocks; 1: it does not.
    """

    def __init__(self, number: int, module: nn.Module, sequence_ranks: int = 1) -> None:
        self.number, self.module = number, module
        self.decoder = decoder_in(module)
        assert self.decoder.span is not None
        self.span: StageSpan = self.decoder.span
        self._sequence_ranks = sequence_ranks
        self.decoder.register_forward_hook(_leave)

    @torch.no_grad()
    def shape(self, call: Callable[[], Any]) -> StageShape:
        """What the decoder would compute when the objective is called so; nothing is computed."""
        self.span.probing = True
        try:
            call()
        except _StageDone as done:
            if isinstance(done.output, StageShape):
                return done.output
        finally:
            self.span.probing = False
        raise ParallelError("the objective did not call its model, which a pipeline relies on")

    def width(self, shape: StageShape, *, before: bool) -> Width:
        """The payload that comes in (before) or goes out, for a micro-batch of this shape."""
        settings, tokens = self.decoder.settings, shape.tokens
        end = self.span.blocks.start if before else self.span.blocks.stop
        routers = tuple(experts for experts in shape.routers[:end] if experts)
        local = tokens // self._sequence_ranks
        mixed = any(settings.is_moe_layer(layer) for layer in range(end))
        dtype = torch.promote_types(self.decoder.stream_dtype, torch.float32) if mixed else self.decoder.stream_dtype
        return Width(local, shape.hidden, routers, tokens, dtype)

    def embedding(self, tokens: int) -> Width:
        """The embedding's output, or its gradient, for rows of so many tokens: all of its width, whatever is used."""
        return Width(tokens, self.decoder.settings.hidden_size, (), tokens, self.decoder.embed.weight.dtype)

    def forward(self, incoming: Hidden | None, call: Callable[[], Any]) -> Any:
        """What the objective gives at the last stage; what goes out (`Hidden`) at any other."""
        self.span.incoming = incoming
        try:
            return call()
        except _StageDone as done:
            return done.output
        finally:
            self.span.incoming = None


def _leave(decoder: nn.Module, arguments: object, output: object) -> None:
    if isinstance(output, StageOutput):
        raise _StageDone(output)


def cut(model: nn.Module, split: Split, stages: list[int]) -> list[nn.Module]:
    """The parts of a model that some stages are, with the names that their parameters have in the whole.

    Args:
        model: whole; its modules are shared with, or moved into, the parts: it is not to be used any more.
        split: of the blocks.
        stages: of this rank.

    Returns:
        A module for each.
    """
    decoder = decoder_in(model)
    if decoder.sequence is not None:
        raise ParallelError("a model whose sequences are divided already cannot be cut into stages")
    if decoder.settings.loop is not None:
        raise ParallelError(
            "a looped decoder (model.loop) runs its blocks several times, and stages would pass it round in circles: "
            "use parallel.pipeline = 1"
        )
    tied = decoder.head is None
    if tied and decoder.settings.chains is not None:
        raise ParallelError(
            "tied embeddings of a decoder of chains (model.chains) are many weights, and the two ends of a pipeline "
            "share one: set model.tie_embeddings = false, or use parallel.pipeline = 1"
        )
    blocks, embed, norm, head = list(decoder.blocks), decoder.embed, decoder.norm, decoder.head
    # What is beside the decoder (a value head, say) looks at its output.
    made = []
    for stage in stages:
        mine = split.layers_of(stage)
        if not mine:
            raise ParallelError(f"stage {stage} of {split.stages} has no block: use fewer stages")
        first, last = stage == 0, stage == split.stages - 1
        for number in range(len(blocks)):
            decoder.blocks[number] = blocks[number] if number in mine else Elsewhere()
        decoder.embed = embed if first or (last and tied) else Elsewhere()  # type: ignore[assignment]
        decoder.norm = norm if last else Elsewhere()
        decoder.head = head if last or tied else Elsewhere()  # type: ignore[assignment]
        part = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        decoder_in(part).span = StageSpan(mine, first=first, last=last)
        made.append(part)
    return made
