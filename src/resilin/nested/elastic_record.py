"""What is known of the sizes that elastic pre-training has trained: told by the settings of its run."""

from __future__ import annotations

from dataclasses import dataclass

from resilin.models.decoder_settings import DecoderSettings
from resilin.nested.budgets import Budget
from resilin.nested.cost import cost
from resilin.nested.elastic_pretraining import ElasticPretraining
from resilin.nested.elastic_sampler import ElasticSampler, left_out, spread
from resilin.nested.rungs import Kind, Rung, SizeRecord
from resilin.nested.sub_model import LayerPart, sub_model


@dataclass(frozen=True, slots=True)
class ElasticRecord(SizeRecord):
    """The ranges of layers, experts and choices that a model was trained in.

    Attributes:
        sampler: the three axes.
    """

    sampler: ElasticSampler

    @classmethod
    def of(cls, settings: ElasticPretraining) -> ElasticRecord:
        """Of a model that was trained so."""
        return cls(settings.sampler)

    def rungs(self, settings: DecoderSettings) -> list[Rung]:
        """One way down, each rung a part of the next, ascending: the whole, fewer choices (halved each time), then the
        smallest of `experts` as well, then fewer and fewer layers as well.
        """
        steps = [Budget()]
        choices = self._choices(settings)
        steps += [Budget(top_k=count) for count in choices]
        fewest = choices[-1] if choices else None
        experts = min(self._experts(settings), default=None)
        if experts is not None:
            steps.append(Budget(top_k=None if fewest is None else min(fewest, experts), experts=experts))
        for skip in self._skips(settings):
            top_k = None if fewest is None else min(fewest, experts or fewest)
            steps.append(Budget(skip=skip, top_k=top_k, experts=experts))
        return [(str(one), one) for one in reversed(steps)]

    def axes(self, settings: DecoderSettings) -> list[Budget]:
        """Budgets that are smaller along one axis alone, by falling cost."""
        found = [Budget(experts=count) for count in sorted(self._experts(settings), reverse=True)]
        found += [Budget(skip=skip) for skip in self._skips(settings)]
        return sorted(found, key=lambda one: -cost(settings, one).flops)

    def kind(self, settings: DecoderSettings, wanted: Budget) -> Kind:
        """Whether steps of the run may have computed a budget.

        Raises:
            BudgetError: it does not fit the model.
        """
        part, whole = sub_model(settings, wanted), sub_model(settings, Budget())
        if part == whole:
            return "trained"
        before = {one.layer: one for one in whole.layers}
        fits = part.hidden == whole.hidden and part.trajectory == whole.trajectory
        fits = fits and self._layers_fit(settings.layers, tuple(one.layer for one in part.layers))
        fits = fits and all(self._layer_fits(settings, one, before[one.layer]) for one in part.layers)
        return "trained" if fits and self._layers_agree(part.layers) else "untrained"

    def _layers_fit(self, layers: int, kept: tuple[int, ...]) -> bool:
        depth = self.sampler.depth
        if len(kept) == layers:
            return True
        if not depth.probability:
            return False
        if depth.plan == "fixed":
            return kept in {tuple(sorted(set(plan))) for plan in depth.plans}
        if len(kept) < depth.least:
            return False
        if depth.plan == "prefix":
            return kept == tuple(range(len(kept)))
        return set(self.sampler.kept_always(layers)) <= set(kept)

    def _layer_fits(self, settings: DecoderSettings, one: LayerPart, whole: LayerPart) -> bool:
        if (one.heads, one.key_heads, one.ffn) != (whole.heads, whole.key_heads, whole.ffn):
            return False
        width, sparsity = self.sampler.width, self.sampler.sparsity
        if one.experts != whole.experts:
            sizes = [self.sampler.count(size, len(whole.experts), one.layer) for size in width.experts]
            if not width.probability or len(one.experts) not in sizes:
                return False
        usual = min(whole.top_k, len(one.experts)) if whole.experts else 0
        fewer = bool(sparsity.probability) and sparsity.least <= one.top_k <= usual
        return one.top_k == usual or fewer

    def _layers_agree(self, layers: tuple[LayerPart, ...]) -> bool:
        """Whether all layers have as many experts and choices, as all draws have; of `shared` the same experts."""
        mixed = [one for one in layers if one.experts]
        sizes = {(len(one.experts), one.top_k) for one in mixed}
        same = len({one.experts for one in mixed}) <= 1 or not self.sampler.width.shared
        return len(sizes) <= 1 and same

    def _choices(self, settings: DecoderSettings) -> list[int]:
        """Numbers of choices below the usual one, halved each time, falling."""
        if settings.moe is None or not self.sampler.sparsity.probability:
            return []
        found, count = [], settings.moe.experts_per_token // 2
        while count > self.sampler.sparsity.least:
            found.append(count)
            count //= 2
        return [*found, self.sampler.sparsity.least]

    def _experts(self, settings: DecoderSettings) -> list[int]:
        if settings.moe is None or not self.sampler.width.probability:
            return []
        return [self.sampler.count(size, settings.moe.experts, 0) for size in self.sampler.width.experts]

    def _skips(self, settings: DecoderSettings) -> list[tuple[int, ...]]:
        """Layers left out, fewer and fewer kept, each plan a part of the one before."""
        layers, depth = settings.layers, self.sampler.depth
        if not depth.probability:
            return []
        if depth.plan == "fixed":
            plans = sorted({tuple(sorted(set(plan))) for plan in depth.plans if len(set(plan)) < layers}, key=len)
            return [left_out(layers, plan) for plan in reversed(plans)]
        fewest = self.sampler.fewest(layers)
        counts = sorted({layers - 1, max(fewest, -(-layers * 3 // 4)), max(fewest, layers // 2)} - {layers})
        kept: tuple[int, ...] = tuple(range(layers))
        found = []
        for count in reversed(counts):
            kept = tuple(range(count)) if depth.plan == "prefix" else tuple(kept[at] for at in spread(len(kept), count))
            found.append(left_out(layers, kept))
        return found
