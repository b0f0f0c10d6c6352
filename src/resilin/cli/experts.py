"""`resilin experts`: experts trained apart, joined, and taken out again; how a mixture uses its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resilin.cli.export import tell_files
from resilin.cli.model_options import DTypeName, ModelArgument, StepOption, TokenizerOption

if TYPE_CHECKING:
    from torch import Tensor

    from resilin.joined.domain import Domain
    from resilin.nested.budgets import Budget
    from resilin.run.open_model import OpenedModel

app = typer.Typer(
    name="experts",
    help="Experts of several owners: trained apart beside one anchor, joined without training, taken out again.",
    no_args_is_help=True,
)

KindName = Literal["encoder", "hidden", "stream", "ngrams", "random"]
ROWS = "Rows of the router"
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUTPUT.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
TextOption = Annotated[
    list[Path] | None, typer.Option(help="Documents: text files (one each), folders, JSONL, Parquet.")
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Experts that a token visits.")]
FileOption = Annotated[float, typer.Option(min=0.001, help="GB of the largest file of weights: so much is in memory.")]


def _rows(opened: OpenedModel, domain: Domain, name: str, texts: list[Path] | None) -> Tensor:
    from resilin.joined.domain import domain_rows, read_documents

    settings = opened.model.settings
    return domain_rows(
        domain,
        read_documents(texts) if texts else (),
        name=name,
        layers=settings.layers,
        width=settings.hidden_size,
        model=opened.model,
        tokenizer=opened.tokenizer,
    )


def _check_documents(domain: Domain, texts: list[Path] | None) -> None:
    from resilin.config.errors import UserError

    if not texts and domain.kind != "random":
        raise UserError(f"rows of kind {domain.kind!r} are made of documents: give some with --text")


@app.command()
def anchor(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    text: TextOption = None,
    rows: Annotated[KindName, typer.Option(help="What a row starts from.", rich_help_panel=ROWS)] = "hidden",
    encoder: Annotated[
        Path | None, typer.Option(help="Of --rows encoder: a sentence encoder's folder.", rich_help_panel=ROWS)
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="At most so many.", rich_help_panel=ROWS)] = 1000,
    tokens: Annotated[int, typer.Option(min=1, help="Of each document.", rich_help_panel=ROWS)] = 512,
    name: Annotated[str, typer.Option(help="Of the model's own feed-forward among experts.")] = "public",
    dtype: Annotated[DTypeName, typer.Option(help="Of the stored weights, and of all that is joined.")] = "float32",
    force: ForceOption = False,
    step: StepOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Make a dense model the anchor that all owners train beside: its weights, frozen, and its row of the router.

    Every owner needs this one folder. Its row is made of public documents, as owners make theirs of their own.

    \b
    resilin experts anchor runs/public anchor --text public/
    resilin experts anchor smollm2 anchor --text public/ --rows encoder
    """
    import torch

    from resilin.joined.anchor import make_anchor
    from resilin.joined.domain import Domain
    from resilin.joined.expert import check_name
    from resilin.run.export import check_output
    from resilin.run.open_model import open_model

    check_name(name)
    check_output(output, force=force)
    domain = Domain(kind=rows, encoder=encoder, documents=documents, tokens=tokens)
    _check_documents(domain, text)
    opened = open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    found = _rows(opened, domain, name, text)
    told = domain.model_dump(mode="json")
    made = make_anchor(
        opened.model,
        opened.tokenizer,
        found,
        output,
        name=name,
        domain=told,
        dtype=getattr(torch, dtype),
        force=force,
    )
    tell_files(f"{opened.description} -> {output}, anchor {made.digest}", sorted(output.iterdir()))
    typer.echo(f"Each owner makes a start of its own: resilin experts seed {output} my-seed --name NAME --text FILES")


@app.command()
def seed(
    anchor: Annotated[Path, typer.Argument(metavar="ANCHOR", help="The folder of `resilin experts anchor`.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    name: Annotated[str, typer.Option(help="Of the new expert.")],
    text: TextOption = None,
) -> None:
    """Make what an owner's training starts from: the expert's name, and its row of the router, made of its documents.

    Documents are looked at here only; nothing of them but one mean vector is written.

    \b
    resilin experts seed anchor news-seed --name news --text news/
    """
    from resilin.joined.anchor import Anchor
    from resilin.joined.domain import Domain
    from resilin.joined.expert import check_name
    from resilin.joined.seed import Seed
    from resilin.run.open_model import open_model, open_outline

    check_name(name)
    beside = Anchor.read(anchor)
    domain = Domain(**beside.domain)
    _check_documents(domain, text)
    asks_model = domain.kind in ("hidden", "stream")
    opened = None if asks_model else open_outline(anchor)
    rows = _rows(opened or open_model(anchor, device="cpu"), domain, name, text)
    files = Seed(name, beside.digest, rows, beside.domain).write(output)
    tell_files(f"{name}, beside {anchor} -> {output}", files)
    typer.echo(
        "Train the expert with:\n"
        f'  [model]\n  use = "resilin.joined.training:NewExpert"\n  path = "{anchor}"\n  seed = "{output}"\n'
        "  [objective]\n  load_balance = 0.0\n  router_z_loss = 0.001\n"
        "and hand it over with `resilin experts pack RUN FOLDER`."
    )


@app.command()
def pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the expert's run.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    about: Annotated[str, typer.Option(help="What its owner says of it, for its card.")] = "",
    step: StepOption = None,
    force: ForceOption = False,
) -> None:
    """Take a trained expert out of its run, to hand it over; nothing of the anchor or of the data is in it.

    What was frozen is compared with the anchor first.

    \b
    resilin experts pack runs/news news-expert --about "news of 2019 to 2024"
    """
    from resilin.joined.runs import pack as packed
    from resilin.run.export import check_output

    check_output(output, force=force)
    expert = packed(run, step=step, card={"about": about} if about else None)
    tell_files(f"{run} -> {output}: expert {expert.name}, {expert.digest}", expert.write(output))


@app.command()
def join(
    base: Annotated[Path, typer.Argument(metavar="ANCHOR", help="The anchor, or a model joined before.")],
    experts: Annotated[list[Path], typer.Argument(metavar="EXPERT...", help="Folders of `resilin experts pack`.")],
    output: OutputOption,
    top_k: TopKOption = None,
    file_size: FileOption = 5.0,
    force: ForceOption = False,
) -> None:
    """Join experts into one mixture; nothing is trained.

    All must have been trained beside this anchor. A token visits all experts unless --top-k says otherwise. With
    offsets (the default) the folder's config.json is our own; without, it is a stock architecture: FlexOlmo for an OLMo
    2 anchor, Mixtral or Qwen3-MoE for others.

    \b
    resilin experts join anchor news-expert math-expert -o joined --top-k 2
    resilin experts join joined code-expert -o larger
    """
    from resilin.joined.expert import Expert
    from resilin.joined.join import join as joined
    from resilin.joined.record import JoinedRecord

    opened = [Expert.read(folder) for folder in experts]
    size = int(file_size * 1e9)
    files = joined(base, opened, output, top_k=top_k, max_shard_bytes=size, force=force)
    tell_files(f"{base} + {', '.join(expert.name for expert in opened)} -> {output}", files)
    typer.echo(f"Experts: {', '.join(JoinedRecord.read(output).names)}")


@app.command()
def without(
    model: Annotated[Path, typer.Argument(metavar="JOINED", help="A folder of `resilin experts join`.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Experts to take out.")],
    output: OutputOption,
    top_k: TopKOption = None,
    keep_tuned: Annotated[
        bool, typer.Option(help="Of a tuned router, keep tuned rows: they have seen the other experts' proxies.")
    ] = False,
    file_size: FileOption = 5.0,
    force: ForceOption = False,
) -> None:
    """Write a joined model without some experts: nothing of them is left, and nothing else changes.

    It is, to the byte, what joining would have written without them; with all of them gone, the dense anchor again.
    To leave an expert out of one answer only, use a budget: `resilin experts show` prints its number.

    \b
    resilin experts without joined news -o less
    """
    from resilin.joined.record import JoinedRecord
    from resilin.joined.without import without as left

    tuned = JoinedRecord.read(model).router == "tuned"
    size = int(file_size * 1e9)
    files = left(model, names, output, top_k=top_k, keep_tuned=keep_tuned, max_shard_bytes=size, force=force)
    tell_files(f"{model} without {', '.join(names)} -> {output}", files)
    if tuned and keep_tuned:
        typer.secho(
            "The rows that stay were tuned together with those that are gone: this is no strict opt-out.",
            fg=typer.colors.YELLOW,
            err=True,
        )
    elif tuned:
        typer.echo("Its router is that of before tuning; tune it again on the proxies of those that stay.")


@app.command()
def show(
    model: Annotated[Path, typer.Argument(metavar="JOINED", help="A folder of `resilin experts join`.")],
    text: Annotated[list[Path] | None, typer.Option(help="Tell each expert's share in reading these texts.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many batches of about 4096 tokens.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Say which experts a joined model has and, with text, how much each of them speaks.

    \b
    resilin experts show joined --text question.txt
    """
    from resilin.joined.record import JoinedRecord
    from resilin.models.huggingface import folder_settings

    record, settings = JoinedRecord.read(model), folder_settings(model)
    assert settings.moe is not None
    rows: list[dict[str, object]] = [
        {"number": number, "name": one.name, "digest": one.digest, "card": dict(one.card)}
        for number, one in enumerate(record.experts)
    ]
    if text:
        for row, shares in zip(rows, _shares(model, text, limit), strict=True):
            row |= {"share": sum(shares) / len(shares), "by_layer": shares}
    facts = {"anchor": record.anchor, "router": record.router, "top_k": settings.moe.experts_per_token}
    if as_json:
        typer.echo(json.dumps(facts | {"experts": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {settings.moe.experts_per_token} of {len(rows)} experts, router {record.router}")
    for column in ("number", "name", "digest", *(["share", "by layer"] if text else []), "card"):
        table.add_column(column, overflow="fold")
    for row in rows:
        told = [str(row["number"]), str(row["name"]), str(row["digest"])]
        if text:
            told += [f"{row['share']:.3f}", " ".join(f"{share:.2f}" for share in row["by_layer"])]  # type: ignore[attr-defined]
        table.add_row(*told, json.dumps(row["card"]) if row["card"] else "-")
    Console().print(table)


def _shares(model: Path, text: list[Path], limit: int) -> list[list[float]]:
    """(expert, layer) shares."""
    from itertools import chain, islice

    from resilin.evaluate.perplexity import read_text
    from resilin.joined.attribution import attribution
    from resilin.nested.text_batches import text_batches
    from resilin.run.open_model import open_model

    opened = open_model(model, device="cpu")
    window = min(opened.model.settings.max_positions, 1024)
    tokens = (opened.needed_tokenizer().encode(read_text(path), parse_special=False) for path in text)
    batches = chain.from_iterable(text_batches(ids, window) for ids in tokens)
    shares: list[list[float]] = attribution(opened.model, islice(batches, limit)).T.tolist()
    return shares


@app.command()
def load(
    model: ModelArgument,
    text: Annotated[list[str], typer.Option(help="NAME=FILE, several times: texts of a name are counted together.")],
    budget: Annotated[str | None, typer.Option(help="Run so much of it: a JSON file, or top_k=2.")] = None,
    share: Annotated[float, typer.Option(help="Of the experts, those that count as most used.")] = 0.25,
    limit: Annotated[int, typer.Option(min=1, help="At most so many batches of about 4096 tokens of a name.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Write heat maps of the loads here (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    step: StepOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Say how any mixture of experts uses them: how even loads are on each kind of text, and what kinds share.

    Entropy is 1 where all experts of a layer have the same load and 0 where one has it all. Overlap is the intersection
    over union of the most used experts of two kinds.

    \b
    resilin experts load runs/elastic --text english=a.txt --text python=b.py --text python=c.py --plot loads.png
    """
    from resilin.nested.budgets import Budget
    from resilin.nested.expert_plot import plot_loads
    from resilin.nested.expert_use import normalised_entropy, overlaps, shares
    from resilin.run.open_model import open_model

    wanted = None if budget is None else Budget.parse(budget)
    opened = open_model(model, step=step, tokenizer=tokenizer, device="cpu")
    counts = _loads(opened, text, limit, wanted)
    told = {
        name: {"share": shares(one).tolist(), "entropy": normalised_entropy(one).tolist()}
        for name, one in counts.items()
    }
    pairs = {f"{one}, {other}": found.tolist() for (one, other), found in overlaps(counts, share).items()}
    if as_json:
        typer.echo(json.dumps({"texts": told, "overlap": pairs}, indent=2))
    else:
        _load_tables({name: one["entropy"] for name, one in told.items()}, pairs, f"{opened.description}")
    if plot is not None and not plot_loads(counts, plot):
        typer.echo("No picture: matplotlib is not installed (pip install resilin[plots]).", err=True)


def _load_tables(entropy: dict[str, list[float]], pairs: dict[str, list[float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    for what, rows in (("Entropy of loads", entropy), ("Overlap of the most used", pairs)):
        if rows:
            layers = range(len(next(iter(rows.values()))))
            table = Table(title=f"{what}, {title}", title_justify="left")
            for column in ("text", *(f"layer {layer}" for layer in layers)):
                table.add_column(column, justify="left" if column == "text" else "right")
            for name, values in rows.items():
                table.add_row(name, *(f"{value:.3f}" for value in values))
            Console().print(table)


def _loads(opened: OpenedModel, text: list[str], limit: int, wanted: Budget | None) -> dict[str, Tensor]:
    """Counts of each name's texts, (layer, expert)."""
    from itertools import chain, islice

    from resilin.config.errors import UserError
    from resilin.evaluate.perplexity import read_text
    from resilin.nested.expert_loads import expert_loads, stacked
    from resilin.nested.text_batches import text_batches

    files: dict[str, list[Path]] = {}
    for one in text:
        name, equals, file = one.partition("=")
        if not equals or not name or not file:
            raise UserError(f"--text {one}: expected NAME=FILE, such as english=a.txt")
        files.setdefault(name, []).append(Path(file))
    window = min(opened.model.settings.max_positions, 1024)
    encode = opened.needed_tokenizer().encode
    counts = {}
    for name, paths in files.items():
        tokens = (encode(read_text(path), parse_special=False) for path in paths)
        batches = chain.from_iterable(text_batches(ids, window) for ids in tokens)
        counts[name] = stacked(expert_loads(opened.model, islice(batches, limit), wanted))
    return counts


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(metavar="JOINED", help="A folder of `resilin experts join`.")],
    experts: Annotated[list[Path] | None, typer.Argument(metavar="[EXPERT]...", help="As handed over.")] = None,
) -> None:
    """Compare a joined model with its record: the anchor's frozen parts and every expert, digest by digest.

    \b
    resilin experts verify joined
    resilin experts verify joined news-expert
    """
    from resilin.joined.expert import Expert
    from resilin.joined.verify import verify as verified

    report = verified(model, [Expert.read(folder) for folder in experts or ()])
    for one in report:
        typer.secho(f"{'ok ' if one.holds else 'BAD'} {one.what}: {one.told}", fg=None if one.holds else "red")
    if not all(one.holds for one in report):
        raise typer.Exit(1)


@app.command()
def retuned(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run with model.use = ...:TunedRouter.")],
    output: OutputOption,
    tuned_on: Annotated[str, typer.Option(help="What its router was tuned on, for the cards.")] = "",
    step: StepOption = None,
    force: ForceOption = False,
) -> None:
    """Write a joined model with the router that a run has tuned.

    The rows as they were joined are kept in the folder: taking an expert out goes back to them.

    \b
    resilin train tune.toml        # model.use = "resilin.joined.training:TunedRouter", model.path = "joined"
    resilin experts retuned runs/tune -o tuned
    """
    from resilin.joined.runs import retuned as written

    files = written(run, output, step=step, tuned_on=tuned_on, force=force)
    tell_files(f"{run} -> {output}", files)


@app.command()
def proxies(
    output: OutputOption,
    own: Annotated[list[Path], typer.Option(help="The owner's documents: files, folders, JSONL, Parquet.")],
    public: Annotated[list[Path], typer.Option(help="Public documents to choose among.")],
    count: Annotated[int, typer.Option(min=1, help="How many proxies.")] = 1000,
    rows: Annotated[
        Literal["ngrams", "encoder"], typer.Option(help="What the classifier reads.", rich_help_panel=ROWS)
    ] = "ngrams",
    encoder: Annotated[
        Path | None, typer.Option(help="Of --rows encoder: a sentence encoder's folder.", rich_help_panel=ROWS)
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="At most so many of each side.", rich_help_panel=ROWS)] = 20000,
) -> None:
    """Find public documents that look like an owner's, to tune a joined router on; at the owner's.

    A classifier tells the owner's documents from public ones. OUTPUT is a JSONL file of public documents: nothing of
    the owner's is in it, but which ones were chosen says what its data are like.

    \b
    resilin experts proxies --own news/ --public public/ --count 500 -o news-proxies.jsonl
    """
    from resilin.joined.domain import Domain, chosen, document_vectors, read_documents
    from resilin.joined.proxies import proxies as found
    from resilin.models.weight_files import write_atomically

    domain = Domain(kind=rows, encoder=encoder)
    mine, theirs = (chosen(read_documents(paths), documents) for paths in (own, public))
    own_ND, public_ND = (document_vectors(domain, texts, None, None, 512) for texts in (mine, theirs))
    numbers = found(own_ND, public_ND, count)
    lines = [json.dumps({"text": theirs[number]}) for number in numbers]
    write_atomically(output, "\n".join(lines) + "\n")
    typer.echo(f"{len(lines)} of {len(theirs)} public documents -> {output}")


@app.command()
def privacy(
    noise: Annotated[float, typer.Option(min=0.0, help="Sigma of objective.noise.")],
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples (rows) of the owner's data.")],
    steps: Annotated[int, typer.Option(min=1, help="Of the run.")],
    delta: Annotated[float | None, typer.Option(help="Default: a tenth of one over --samples.")] = None,
) -> None:
    """Say what privacy training with `resilin.objective.private:Private` gives each sample: its epsilon and delta.

    \b
    resilin experts privacy --noise 1.0 --batch 256 --samples 100000 --steps 2000
    """
    from resilin.config.errors import UserError
    from resilin.objective.private import epsilon

    delta = 0.1 / samples if delta is None else delta
    try:
        value = epsilon(noise, min(1.0, batch / samples), steps, delta)
    except ValueError as error:
        raise UserError(str(error)) from None
    typer.echo(f"epsilon {value:.3f} at delta {delta:g}")
