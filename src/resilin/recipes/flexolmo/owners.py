"""The models of the recipe: a public model, each owner's expert beside it, dense models that are trained on, and what
is made of them. Each is an earlier run (`resilin.recipes.stage`), which the recipe's arms share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from resilin.config import Settings, component
from resilin.data.settings import SourceContext, SourceSettings
from resilin.joined.beside import beside_anchor
from resilin.joined.domain import Domain, Kind, domain_rows
from resilin.joined.expert import Expert, expert_at, expert_of_dense
from resilin.joined.join import join_models
from resilin.joined.training import router_only
from resilin.joined.upcycle import upcycle
from resilin.models.decoder import Decoder
from resilin.models.settings import ModelContext, ModelSettings
from resilin.recipes.stage import Stage

_DOCUMENTS = 256
PUBLIC = "public"


def texts_of(source: SourceSettings, count: int = _DOCUMENTS) -> list[str]:
    """So many training rows as text."""
    built: Any = source.build(SourceContext(0, "train", count))
    tokens_BT = built.fetch(0, range(count))["tokens"]
    return [built.tokenizer.decode(row) for row in tokens_BT.tolist()]


def rows_of(model: Decoder, source: SourceSettings, name: str, kind: Kind) -> Tensor:
    """(L, D): rows of the router for the rows of a source."""
    built: Any = source.build(SourceContext(0, "train", 1))
    width, layers = model.settings.hidden_size, model.settings.layers
    domain = Domain(kind=kind, documents=_DOCUMENTS, tokens=built.sequence_length)
    texts = texts_of(source)
    return domain_rows(domain, texts, name=name, layers=layers, width=width, model=model, tokenizer=built.tokenizer)


class OwnExpert(ModelSettings):
    """An owner's expert beside the public model, at the start of its training."""

    public: Stage
    """The public model's run."""
    name: str
    """Of the expert."""
    source: Annotated[SourceSettings, component("resilin.recipes.installed_text:InstalledText")]
    """The owner's data, of which its row is made."""
    rows: Kind = "stream"
    """What rows are made of."""
    offsets: bool = True
    """Whether the expert has offsets."""

    def build(self, context: ModelContext) -> nn.Module:
        """The decoder with its expert."""
        model = self.public.build(context)
        assert isinstance(model, Decoder)
        anchor_rows_LD = rows_of(model, self.public.settings(context.seed).source, PUBLIC, self.rows)
        rows_LD = rows_of(model, self.source, self.name, self.rows)
        return beside_anchor(model, anchor_rows_LD, rows_LD, -0.1 if self.offsets else None)


class Upcycled(ModelSettings):
    """A mixture of dense models: of the public one several times, or of those that owners have trained on (BTX)."""

    models: tuple[Stage, ...] = Field(min_length=1)
    """Their runs; each is an expert."""
    top_k: int | None = None
    """Experts that a token visits."""

    def build(self, context: ModelContext) -> nn.Module:
        """The mixture, its router at the start."""
        models = [stage.build(context) for stage in self.models]
        return upcycle([one for one in models if isinstance(one, Decoder)], top_k=self.top_k, seed=context.seed)


class Team(Settings):
    """The runs that all arms share, as settings of their own."""

    public: dict[str, Any]
    """Settings of the public model's run, as a tree."""
    domains: dict[str, dict[str, Any]]
    """The source of each owner, by name."""
    owner: dict[str, Any]
    """What of the public run's settings is other in an owner's."""
    all_steps: int = Field(gt=0)
    """Steps of the unrestricted mixture, which reads everybody's data."""
    rows: Kind = "stream"
    """What rows are made of."""
    offsets: bool = True
    """Whether experts have offsets."""

    def _owner_run(self, source: dict[str, Any], model: dict[str, Any], **more: Any) -> Stage:
        tree = {**self.public, **{k: v for k, v in self.owner.items() if k != "train"}, "source": source, **more}
        tree["train"] = {**self.public.get("train", {}), **self.owner.get("train", {}), **more.get("train", {})}
        return Stage(run={**tree, "model": model})

    @property
    def base(self) -> Stage:
        """The public model."""
        return Stage(run=self.public)

    def expert(self, name: str) -> Stage:
        """An owner's expert."""
        model = {
            "use": "resilin.recipes.flexolmo.owners:OwnExpert",
            "public": {"run": self.public},
            "name": name,
            "source": self.domains[name],
            "rows": self.rows,
            "offsets": self.offsets,
        }
        return self._owner_run(self.domains[name], model, objective={"load_balance": 0.0})

    def dense(self, name: str) -> Stage:
        """The public model trained on with an owner's data, nothing frozen."""
        return self._owner_run(self.domains[name], {"use": "resilin.recipes.stage:Stage", "run": self.public})

    def btx(self) -> Stage:
        """Branch-train-mix: the dense models as experts, trained on public data, the only data there are."""
        models = [{"run": stage.run} for stage in (self.base, *map(self.dense, self.domains))]
        model = {"use": "resilin.recipes.flexolmo.owners:Upcycled", "models": models, "top_k": 2}
        return self._owner_run(self.public["source"], model)

    def everything(self) -> Stage:
        """The unrestricted mixture: as many experts, of the public model, trained together on everybody's data."""
        models = [{"run": self.public}] * (len(self.domains) + 1)
        model = {"use": "resilin.recipes.flexolmo.owners:Upcycled", "models": models, "top_k": 2}
        parts = [{"source": source} for source in (self.public["source"], *self.domains.values())]
        source = {"use": "resilin.data.mix:Mix", "parts": parts}
        return self._owner_run(source, model, train={"steps": self.all_steps})

    def stage(self) -> dict[str, Stage]:
        """All earlier runs of an arm, for whoever removes them."""
        experts = {f"expert {name}": self.expert(name) for name in self.domains}
        dense = {f"dense {name}": self.dense(name) for name in self.domains}
        return {PUBLIC: self.base, **experts, **dense, "btx": self.btx(), "everything": self.everything()}


class Members:
    """The trained models of a team.

    Attributes:
        public: the anchor.
        anchor_rows_LD: its rows.
        pairs: each owner's expert beside the anchor.
        experts: the experts alone, in the order of the owners.
    """

    def __init__(self, team: Team, seed: int) -> None:
        """Trains what has not been trained yet."""
        self.team, self.context = team, ModelContext(seed)
        self.public = self.built(team.base)
        self.anchor_rows_LD = rows_of(self.public, team.base.settings(seed).source, PUBLIC, team.rows)
        self.pairs = {name: self.built(team.expert(name)) for name in team.domains}
        self.experts: list[Expert] = [expert_at(pair, 1, name) for name, pair in self.pairs.items()]

    def built(self, stage: Stage) -> Decoder:
        """The model of a run, in evaluation."""
        model = stage.build(self.context)
        assert isinstance(model, Decoder)
        return model.eval()

    def joined(self) -> Decoder:
        """All experts, without training."""
        return join_models(self.public, self.anchor_rows_LD, self.experts)

    def dense(self) -> Mapping[str, Decoder]:
        """Each owner's dense model."""
        return {name: self.built(self.team.dense(name)) for name in self.team.domains}

    def uncoordinated(self, dense: Mapping[str, Decoder]) -> Decoder:
        """The feed-forwards of the dense models as experts, which never learnt to stand beside the anchor."""
        rows = {name: expert.rows() for name, expert in zip(self.team.domains, self.experts, strict=True)}
        experts = [expert_of_dense(model, "", name, rows[name]) for name, model in dense.items()]
        return join_models(self.public, self.anchor_rows_LD, experts)


class JoinedRouter(ModelSettings):
    """The joined model whose router is tuned: what the recipe's own runs train."""

    team: Team
    """Who is joined."""
    baselines: Literal["all", "none"] = "all"
    """Whether other ways of joining are measured beside it."""

    def stage(self) -> dict[str, Stage]:
        """The earlier runs."""
        return self.team.stage()

    def build(self, context: ModelContext) -> nn.Module:
        """The model; its router's rows alone are trained."""
        return router_only(Members(self.team, context.seed).joined()).train()
