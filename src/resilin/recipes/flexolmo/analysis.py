"""The analysis of the recipe `flexolmo`: losses by domain of everything that was joined, and what leaving does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from resilin.recipes.findings import Claim, Findings, Line, Plot, Row, Study, Table
from resilin.recipes.gains import Values, gain_claim, gain_of

ARM = "flexolmo"
PUBLIC = "public"
UNIT = "nat/byte"
NEAR = 0.05
"""What counts as a few hundredths: of a pair of experts, and of what leaving does to the other domains."""
PAPER = {
    "public": "36.9",
    "soup": "39.6",
    "weighted soup": "42.2",
    "btm": "43.4",
    "prompt routing": "40.8",
    "btx": "40.0",
    "no coordination": "38.8",
    "joined": "46.7",
    "tuned": "47.8",
    "unrestricted": "46.3 / 51.5",
}
"""Averages of 24 tasks at 7B, in percent: larger is better there."""
TITLES = {
    "public": "the public model",
    "soup": "average of the dense models (soup)",
    "weighted soup": "average weighted by the prompt",
    "btm": "ensemble weighted by the prompt (BTM)",
    "btm, 2": "the same, the two best models",
    "prompt routing": "a classifier chooses one model",
    "btx": "dense models as experts, router trained on public text (BTX)",
    "no coordination": "dense feed-forwards joined, never trained beside the anchor",
    "joined": "experts joined, nothing trained",
    "tuned": "the same, router tuned on public text and proxies",
    "unrestricted": "one mixture trained on everybody's data",
}


def domains_of(study: Study) -> tuple[str, ...]:
    """The owners, as the runs name them."""
    names: dict[str, None] = {}
    for trial in study.select(arm=ARM):
        for key in trial.record.final:
            head, _, last = key.rpartition("/")
            if head == "joined/joined" and last != PUBLIC:
                names[last] = None
    return tuple(names)


def measured(study: Study, method: str, domain: str, arm: str = ARM) -> Values:
    """A loss at the end of an arm's runs."""
    found = {t.seed: t.record.final.get(f"joined/{method}/{domain}") for t in study.select(arm=arm)}
    return {seed: value for seed, value in found.items() if value is not None}


def mean_of(study: Study, method: str, domains: Sequence[str], arm: str = ARM) -> Values:
    """The mean over domains, by seed."""
    each = [measured(study, method, domain, arm) for domain in domains]
    seeds = set.intersection(*(set(one) for one in each)) if each else set()
    return {seed: statistics.fmean(one[seed] for one in each) for seed in sorted(seeds)}


def _within(name: str, statement: str, excess: Sequence[float], most: float) -> Claim:
    """Whether an excess stays at or under `most` on average."""
    mean = statistics.fmean(excess) if excess else math.inf
    return Claim(name=name, statement=statement, holds=mean <= most, evidence=f"{mean:+.4f} over {len(excess)} seeds")


def claims(study: Study) -> list[Claim]:
    """What the paper says, and what the specification of the method adds."""
    domains = domains_of(study)
    everything = (PUBLIC, *domains)
    return [
        *_of_domains(study, domains),
        *_of_methods(study, domains, everything),
        *_of_leaving(study, domains),
        *_of_arms(study, everything),
    ]


def _of_domains(study: Study, domains: Sequence[str]) -> list[Claim]:
    found = []
    for name in domains:
        joined = measured(study, "joined", name)
        gains = gain_of(joined, measured(study, PUBLIC, name))
        statement = f"the joined model has a lower loss on {name} than the public model"
        found.append(gain_claim(f"{name} better than public", statement, gains, 0.0, "nat/byte"))
        excess = gain_of(measured(study, f"pair {name}", name), joined)
        relative = [
            more / one for more, one in zip(excess, measured(study, f"pair {name}", name).values(), strict=True)
        ]
        statement = f"... and within {NEAR:.0%} of that of the owner's own expert beside the anchor"
        found.append(_within(f"{name} near its pair", statement, relative, NEAR))
    kept = gain_of(measured(study, PUBLIC, PUBLIC), measured(study, "joined", PUBLIC))
    public = measured(study, PUBLIC, PUBLIC)
    relative = [more / one for more, one in zip(kept, public.values(), strict=True)]
    statement = f"on public text the joined model stays within {NEAR:.0%} of the public model's loss"
    found.append(_within("public kept", statement, relative, NEAR))
    return found


def _of_methods(study: Study, domains: Sequence[str], everything: Sequence[str]) -> list[Claim]:
    joined = mean_of(study, "joined", everything)
    found = []
    for method in ("soup", "weighted soup", "btm", "prompt routing", "btx", "no coordination"):
        statement = f"joined experts have a lower mean loss over all domains than: {TITLES[method]}"
        gains = gain_of(joined, mean_of(study, method, everything))
        found.append(gain_claim(f"better than {method}", statement, gains, 0.0, "nat/byte"))
    tuned = gain_of(mean_of(study, "tuned", everything), joined)
    found.append(gain_claim("tuning helps", "tuning the router lowers the mean loss further", tuned, 0.0, "nat/byte"))
    whole = gain_of(mean_of(study, "unrestricted", everything), joined)
    statement = f"joined without joint training it stays within {NEAR} nat/byte of one mixture trained on all data"
    found.append(_within("near the unrestricted mixture", statement, whole, NEAR))
    extracted = [
        gain_of(measured(study, "extracted/joined", name), measured(study, "extracted/dense", name)) for name in domains
    ]
    fewer = [statistics.fmean(column) for column in zip(*extracted, strict=True)] if all(extracted) else []
    statement = "no more training text is extracted from the joined model than from dense models trained on it"
    found.append(_within("extraction", statement, [-gain for gain in fewer], 0.0))
    return found


def _of_leaving(study: Study, domains: Sequence[str]) -> list[Claim]:
    found = []
    for name in domains:
        joined, without = measured(study, "joined", name), measured(study, f"without {name}", name)
        public = measured(study, PUBLIC, name)
        seeds = sorted(set(joined) & set(without) & set(public))
        lost = [(without[s] - joined[s]) / (public[s] - joined[s]) for s in seeds if public[s] > joined[s]]
        statement = f"without the expert of {name}, at least half of what it gave on {name} is lost"
        found.append(gain_claim(f"{name} forgotten", statement, lost, 0.5, "share of the gain over the public model"))
        moved: list[float] = []
        for seed in seeds:
            others = [o for o in (PUBLIC, *domains) if o != name]
            changes = [
                abs(measured(study, f"without {name}", o)[seed] / measured(study, "joined", o)[seed] - 1)
                for o in others
            ]
            moved.append(statistics.fmean(changes))
        statement = f"... and the losses of the other domains change by at most {NEAR:.0%} on average"
        found.append(_within(f"others keep without {name}", statement, moved, NEAR))
    return found


def _of_arms(study: Study, everything: Sequence[str]) -> list[Claim]:
    joined, found = mean_of(study, "joined", everything), []
    for arm, words in (("no_offsets", "without offsets"), ("random_rows", "with random rows at the start")):
        gains = gain_of(joined, mean_of(study, "joined", everything, arm))
        statement = f"the mean loss over all domains is lower than {words}"
        found.append(gain_claim(f"better than {arm}", statement, gains, 0.0, "nat/byte"))
    return found


def _mean(values: Values) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _losses(study: Study, domains: Sequence[str]) -> Table:
    everything, rows = (PUBLIC, *domains), []
    listed = [*TITLES.items()]
    listed[1:1] = [(f"dense {name}", f"trained on with {name}, nothing frozen") for name in domains]
    listed += [(f"pair {name}", f"the expert of {name} beside the anchor") for name in domains]
    listed += [(f"without {name}", f"joined, without {name}") for name in domains]
    for method, title in listed:
        values = [_mean(measured(study, method, domain)) for domain in everything]
        if any(value is not None for value in values):
            rows.append((title, *values, _mean(mean_of(study, method, everything)), PAPER.get(method, "-")))
    for arm, title in (("no_offsets", "joined, no offsets"), ("random_rows", "joined, random rows at the start")):
        values = [_mean(measured(study, "joined", domain, arm)) for domain in everything]
        paper = {"no_offsets": "45.8", "random_rows": "44.4 (nor offsets)"}[arm]
        if any(value is not None for value in values):
            rows.append((title, *values, _mean(mean_of(study, "joined", everything, arm)), paper))
    return Table(
        title="Held-out loss by domain, nat/byte behind a prompt of 32 bytes",
        columns=("", *everything, "mean", "paper, 7B, % of 24 tasks"),
        rows=tuple(rows),
    )


def _counts(study: Study, domains: Sequence[str]) -> list[str]:
    total = len(domains) + 1
    return [*(f"joined, {count} of {total}" for count in range(1, total)), "joined"]


def _choices(study: Study, domains: Sequence[str]) -> Table:
    everything = (PUBLIC, *domains)
    rows = []
    for method in _counts(study, domains):
        values = [_mean(measured(study, method, domain)) for domain in everything]
        told = method.removeprefix("joined, ") if method != "joined" else "all"
        rows.append((told, *values, _mean(mean_of(study, method, everything))))
    return Table(title="Experts that a token visits", columns=("", *everything, "mean"), rows=tuple(rows))


def _shares(study: Study, domains: Sequence[str]) -> Table:
    everything = (PUBLIC, *domains)
    rows = [(text, *(_mean(measured(study, f"share/{text}", expert)) for expert in everything)) for text in everything]
    return Table(
        title="Whose experts read what: share of the routing weight",
        columns=("text of", *(f"expert {name}" for name in everything)),
        rows=tuple(rows),
    )


def _extraction(study: Study, domains: Sequence[str]) -> Table:
    rows = [
        (words, *(_mean(measured(study, f"extracted/{method}", domain)) for domain in domains), paper)
        for method, words, paper in (
            ("public", "the public model", "0.1 %"),
            ("dense", "trained on with it", "1.6 %"),
            ("joined", "joined", "0.7 %"),
        )
    ]
    return Table(
        title="Training text given back (32 bytes given, 32 compared, ten samples)",
        columns=("share of texts", *domains, "paper, math"),
        rows=tuple(rows),
    )


def _plots(study: Study, domains: Sequence[str]) -> tuple[Plot, ...]:
    everything = (PUBLIC, *domains)
    labels = ", ".join(f"{number} {name}" for number, name in enumerate(everything))
    x = tuple(float(number) for number in range(len(everything)))
    lines = []
    for method in ("public", "soup", "btm", "no coordination", "joined", "tuned", "unrestricted"):
        values = tuple(_mean(measured(study, method, domain)) for domain in everything)
        if any(value is not None for value in values):
            lines.append(Line(label=method, x=x, y=values))
    by_domain = Plot(title="Held-out loss by domain", x_label=labels, y_label=UNIT, lines=tuple(lines))
    counts = tuple(float(number + 1) for number in range(len(everything)))
    swept = [
        Line(label=domain, x=counts, y=tuple(_mean(measured(study, m, domain)) for m in _counts(study, domains)))
        for domain in everything
    ]
    return by_domain, Plot(title="Experts that a token visits", x_label="experts", y_label=UNIT, lines=tuple(swept))


def analyse(study: Study) -> Findings:
    """Rows, claims, tables and the pictures."""
    domains = domains_of(study)
    if not domains:
        return Findings()
    everything = (PUBLIC, *domains)
    rows = []
    for method, title in TITLES.items():
        values = list(mean_of(study, method, everything).values())
        if values:
            rows.append(Row.over_seeds(f"mean loss of all domains: {title}", values, UNIT, PAPER.get(method, "")))
    return Findings(
        rows=tuple(rows),
        claims=tuple(claims(study)),
        tables=(
            _losses(study, domains),
            _choices(study, domains),
            _shares(study, domains),
            _extraction(study, domains),
        ),
        plots=_plots(study, domains),
    )
