"""Next-token prediction with a frozen teacher's distribution beside the labels.

Shapes: B samples, T tokens, N valid tokens of all samples, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from resilin.config import UserError, component
from resilin.keys import Keys
from resilin.models.digest import weights_digest
from resilin.models.original import make_original
from resilin.models.settings import ModelContext, ModelSettings
from resilin.nouns import Batch, Loss, Mean
from resilin.objective.cross_entropy import CrossEntropyTerms, TokenSums, chunk_rows
from resilin.objective.distillation import (
    Direction,
    DistillationTerms,
    Teacher,
    TeacherLogits,
    TeacherStates,
    TopLogprobs,
    chunked_distillation,
    top_logprobs,
    whole_distillation,
)
from resilin.objective.next_token import (
    IGNORE,
    NextToken,
    NextTokenLoss,
    softcap_of,
    states_of,
    valid_tokens,
)
from resilin.objective.settings import ObjectiveContext, needed
from resilin.objective.teacher_cache import TeacherCache
from resilin.objective.vocabulary import vocabulary_of, whole_head


class TeacherError(UserError, ValueError):
    """A teacher that this model cannot learn from; the text says why."""


class Distilled(NextToken):
    """ce_weight * cross-entropy + kl_weight * T^2 * KL(teacher || student), summed over valid tokens."""

    teacher: Annotated[ModelSettings, component("resilin.models.pretrained:Pretrained")] | None = None
    """The teacher, as a model's settings; left out: the run's own model as it was before the first step, without what
    a method has put on it (the dense original of a sparse model)."""
    kl_weight: float = Field(default=0.67, ge=0)
    """a, of the divergence. AST: 0.67 for GPT-2, larger for smaller models; 0.5 beside ce_weight = 1 for LLaMA2."""
    ce_weight: float | None = Field(default=None, ge=0)
    """Of the cross-entropy with the labels; left out: 1 - kl_weight."""
    temperature: float = Field(default=2.0, gt=0)
    """T, dividing the logits of both inside the divergence, which is multiplied by T^2."""
    direction: Direction = "forward"
    """forward: KL(teacher || student); reverse: KL(student || teacher)."""
    layer_weight: float = Field(default=0.0, ge=0)
    """Of the relative squared error of the hidden states after each block ("SquareHead", Kurtic et al., 2023), the
    mean over blocks, for each token by itself. AST found that it hurts."""
    top_k: int = Field(default=0, ge=0)
    """Keep only this many of the teacher's most likely tokens for each row of data, computed once; all other tokens
    count as one outcome. 0: the whole distribution, computed each time."""
    cache: Path | None = None
    """With top_k: the folder of those rows, which runs may share; left out: `teacher` in the run's folder."""

    @model_validator(mode="after")
    def _check(self) -> Distilled:
        if self.ce_weight is None and self.kl_weight > 1:
            raise ValueError(
                f"kl_weight ({self.kl_weight:g}) leaves the cross-entropy a weight below 0: use at most 1, or give "
                "ce_weight"
            )
        if self.top_k and self.direction == "reverse":
            raise ValueError("direction = 'reverse' needs the teacher's whole distribution: set top_k = 0")
        if self.top_k and self.layer_weight:
            raise ValueError("layer_weight needs the teacher's hidden states, which top_k does not keep: set one to 0")
        return self

    @property
    def terms(self) -> DistillationTerms:
        """Weights, temperature and direction."""
        ce = 1 - self.kl_weight if self.ce_weight is None else self.ce_weight
        return DistillationTerms(ce, self.kl_weight, self.temperature, self.direction)

    def build(self, context: ObjectiveContext | None = None) -> NextTokenLoss:
        """The loss, with its teacher; without one where both its weights are 0.

        Raises:
            ValueError: without a context.
        """
        if not self.kl_weight and not self.layer_weight:
            return DistilledLoss(self, None)
        run = needed(context, "Distilled")
        if self.teacher is None:
            teacher = make_original(run.initial_model())
        else:
            vocabulary = getattr(run.source, "vocab_size", None)
            teacher = self.teacher.build(ModelContext(run.seed, vocabulary))
        teacher = teacher.to(run.device).eval().requires_grad_(False)
        cache = None
        if self.top_k:
            folder = self.cache or (None if run.folder is None else run.folder / "teacher")
            cache = TeacherCache(folder, weights_digest(teacher), self.top_k, self.temperature)
        return DistilledLoss(self, teacher, cache)


@contextmanager
def _block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what each block of a decoder gives while the model runs inside."""
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise TeacherError(f"layer_weight needs models with `blocks`; {type(model).__name__} has none: set it to 0")
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class DistilledLoss(NextTokenLoss):
    """The loss of `Distilled`: as `NextTokenLoss`, with a teacher; logs `kl`, the plain divergence of a token.

    The teacher is not state: a resumed run makes it again.
    """

    by_token = False  # a teacher has to see whole rows

    def __init__(self, settings: Distilled, teacher: nn.Module | None, cache: TeacherCache | None = None) -> None:
        super().__init__(settings)
        self.distilled, self.teacher, self.cache = settings, teacher, cache

    def __call__(self, model: nn.Module, batch: Batch, keys: Keys | None) -> Loss:
        """The loss sum, its units, and the logs of `NextTokenLoss` with `kl` (and `layer_loss`)."""
        if self.teacher is None or not self.distilled.layer_weight:
            return super().__call__(model, batch, keys)
        with _block_outputs(model) as student:
            output = model(batch["tokens"], batch.get("positions"), batch.get("documents"), keys=keys)
        with _block_outputs(self.teacher) as wanted:
            target = self._run_teacher(batch)
        self._target = target  # for `_sums`, so that the teacher runs once
        try:
            loss = self.loss_of(model, output, batch)
        finally:
            self._target = None
        return self._with_layers(loss, student, wanted, batch)

    _target: Any = None

    def _sums(self, model: Any, output: Any, batch: Batch, valid_BT: Tensor) -> tuple[TokenSums, dict[str, Tensor]]:
        if self.teacher is None or not self.distilled.kl_weight:
            sums, further = super()._sums(model, output, batch, valid_BT)
            ce = self.distilled.terms.ce
            return (sums if ce == 1 else sums._replace(loss=ce * sums.loss)), further
        settings, terms = self.settings, self.distilled.terms
        states, labels_N, weights_N = valid_tokens((states_of(output), batch["labels"], batch.get("weights")), valid_BT)
        assert states is not None
        assert labels_N is not None
        whole = isinstance(output, Tensor)
        vocabulary = states.shape[-1] if whole else vocabulary_of(model)
        teacher = self._teacher_of(batch, valid_BT, vocabulary)
        plain = CrossEntropyTerms(settings.label_smoothing, settings.z_loss)
        if whole or settings.chunk == 0:
            logits = states if whole else model.logits(states)
            sums, kl = whole_distillation(logits, labels_N, weights_N, teacher, plain, terms)
        else:
            capped = CrossEntropyTerms(plain.smoothing, plain.z_loss, softcap_of(model))
            head = whole_head(model, "distillation (but with objective.chunk = 0)")
            sums, kl = chunked_distillation(states, head, labels_N, weights_N, teacher, capped, terms, settings.chunk)
        return sums, {"kl": kl}

    @torch.no_grad()
    def _run_teacher(self, batch: Batch) -> Any:
        assert self.teacher is not None
        return self.teacher(batch["tokens"], batch.get("positions"), batch.get("documents"), keys=None)

    def _teacher_of(self, batch: Batch, valid_BT: Tensor, vocabulary: int) -> Teacher:
        """What the loss compares with, for the valid tokens."""
        if self.cache is None:
            output = self._run_teacher(batch) if self._target is None else self._target
            return self._of_output(output, valid_BT, vocabulary)

        def compute(rows: Tensor) -> TopLogprobs:
            part = Batch(batch.slots_B[rows.cpu()], {name: field[rows] for name, field in batch.fields.items()})
            everything = self._of_output(self._run_teacher(part), None, vocabulary)
            count = chunk_rows(vocabulary, rows.device.type)
            return top_logprobs(everything, self.distilled.top_k, self.distilled.temperature, count)

        found = self.cache.rows(batch, compute)
        index_N = valid_BT.flatten().nonzero()[:, 0]
        return TopLogprobs(found.index_NK[index_N], found.logprobs_NK[index_N])

    def _of_output(self, output: Any, valid_BT: Tensor | None, vocabulary: int) -> TeacherStates | TeacherLogits:
        states_BT = states_of(output)
        states = states_BT.flatten(0, 1) if valid_BT is None else valid_tokens((states_BT,), valid_BT)[0]
        assert states is not None
        whole = isinstance(output, Tensor)
        head: Tensor | None = None if whole else whole_head(self.teacher, "a teacher")
        known = states.shape[-1] if head is None else len(head)
        if known != vocabulary:
            raise TeacherError(
                f"the teacher knows {known} tokens and the student {vocabulary}: a distribution can be learned only "
                "from a model of the same vocabulary; choose another objective.teacher"
            )
        if self.distilled.top_k > known:
            raise TeacherError(f"objective.top_k ({self.distilled.top_k}) exceeds the vocabulary ({known})")
        return TeacherLogits(states) if head is None else TeacherStates(states, head, softcap_of(self.teacher))

    def _with_layers(self, loss: Loss, student: list[Tensor], wanted: list[Tensor], batch: Batch) -> Loss:
        """Adds the mean over blocks of |s - t|^2 / |t|^2, for each valid token."""
        shapes = [tuple(x.shape[2:]) for x in student], [tuple(x.shape[2:]) for x in wanted]
        if shapes[0] != shapes[1]:
            raise TeacherError(
                f"layer_weight compares block with block: the student has {len(student)} of width {shapes[0][0][0]}, "
                f"the teacher {len(wanted)} of width {shapes[1][0][0]}; set it to 0"
            )
        weights_BT = (batch["labels"] != IGNORE).double()
        given_BT = batch.get("weights")
        if given_BT is not None:
            weights_BT = weights_BT * given_BT
        total = loss.sum.new_zeros(())
        for ours, theirs in zip(student, wanted, strict=True):
            wide = torch.promote_types(ours.dtype, torch.float32)
            error_BT = (ours.to(wide) - theirs.to(wide)).square().sum(-1)
            size_BT = theirs.to(wide).square().sum(-1).clamp_min(torch.finfo(wide).tiny)
            total = total + (weights_BT * (error_BT / size_BT).double()).sum()
        total = total / len(student)
        logs = {**loss.logs, "layer_loss": Mean(total.detach(), loss.units)}
        return Loss(loss.sum + self.distilled.layer_weight * total, loss.units, logs)
