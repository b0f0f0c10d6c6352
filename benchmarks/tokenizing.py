"""MB/s of text to packed token rows, against datasets.map with the same tokenizer on the same documents.

Both start from documents and end with token rows on disk, on the same cores, in turns. The peer's documents are
already in its own Arrow format when the clock starts; ours are read from JSONL within the time. Both must end with the
same number of tokens.

    resilin bench run tokenizing --help
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LENGTH = 256


def standard_library(megabytes: float) -> list[str]:
    """Source files of Python's own library: text that every machine has."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    return texts


def folder_texts(folder: Path) -> list[str]:
    """Paragraph by paragraph, the text files of a folder."""
    return [
        paragraph
        for path in sorted(folder.glob("*.txt"))
        for paragraph in path.read_text(encoding="utf-8").split("\n\n")
        if paragraph
    ]


def ours(documents: Path, tokenizer_folder: Path, work: Path) -> int:
    """Tokens written by Resilin; packing into rows costs nothing, for rows are views of the shards."""
    from resilin.data.inputs import find_inputs
    from resilin.data.tokenize import tokenize_files
    from resilin.data.tokenize_options import TokenizeOptions
    from resilin.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_folder)
    shards, _ = tokenize_files(find_inputs([documents]), work / "shards", tokenizer, TokenizeOptions())
    return shards.token_count


def peer(data: Any, tokenizer_folder: Path, work: Path, processes: int | None) -> int:
    """Tokens written by the usual two `map` calls: tokenise, then join and cut into rows of one length."""
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false" if processes else "true"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    end = tokenizer.eos_token_id

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*document, end] for document in ids]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for document in batch["input_ids"] for token in document]
        return {"input_ids": [joined[at : at + LENGTH] for at in range(0, len(joined), LENGTH)]}

    options = {"batched": True, "num_proc": processes}
    ids = data.map(tokenise, remove_columns=["text"], cache_file_name=str(work / "ids.arrow"), **options)
    rows = ids.map(pack, cache_file_name=str(work / "rows.arrow"), **options)
    return sum(len(row) for row in rows["input_ids"])


def cpu_seconds() -> float:
    """Processor time of this process and of those it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work: Path, function: Callable[[Path], int]) -> tuple[float, float, int]:
    """Seconds, processor seconds and tokens of one turn in an empty folder."""
    turn = Path(tempfile.mkdtemp(dir=work))
    start, cpu = time.perf_counter(), cpu_seconds()
    tokens = function(turn)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    shutil.rmtree(turn)
    return seconds, cpu, tokens


def measure(name: str, texts: list[str], vocabulary: int, rounds: int, cores: int, work: Path) -> list[Any]:
    """The rows of one text: against two processes, and against the tokenizer's own threads."""
    import datasets

    from resilin.bench.results import Row
    from resilin.data.train_tokenizer import train_bpe

    train_bpe(texts, vocabulary).save(work / "tokenizer")
    documents = work / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    data = datasets.Dataset.from_dict({"text": texts})
    data.save_to_disk(str(work / "data"))
    data = datasets.load_from_disk(str(work / "data"))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    contenders: dict[str, Callable[[Path], int]] = {
        "ours": lambda turn: ours(documents, work / "tokenizer", turn),
        f"datasets.map, {cores} processes": lambda turn: peer(data, work / "tokenizer", turn, cores),
        "datasets.map, tokenizer threads": lambda turn: peer(data, work / "tokenizer", turn, None),
    }
    speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
    thrift: dict[str, list[float]] = {contender: [] for contender in contenders}
    tokens = set()
    for turn in range(rounds):
        for contender, function in contenders.items():
            seconds, cpu, count = timed(work, function)
            speeds[contender].append(megabytes / seconds)
            thrift[contender].append(megabytes / cpu)
            tokens.add(count)
            print(f"{name}, turn {turn + 1}: {contender}: {megabytes / seconds:.2f} MB/s", flush=True)
    if len(tokens) != 1:
        raise SystemExit(f"{name}: the contenders disagree on the number of tokens: {sorted(tokens)}")
    rows = []
    for contender in contenders:
        if contender == "ours":
            continue
        what = f"{name} ({megabytes:.1f} MB) against {contender}"
        rows.append(Row.from_turns(what, "MB/s", speeds["ours"], speeds[contender], contender, target=2.0))
        # Processor time is what a machine shared with other work leaves comparable.
        unit = "MB per CPU second"
        rows.append(Row.from_turns(what, unit, thrift["ours"], thrift[contender], contender, target=2.0))
    return rows


def main() -> None:
    """Measure and write benchmarks/results/tokenizing.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of the standard library's source")
    parser.add_argument("--text", type=Path, help="a folder of .txt files to measure on as well (prose, say)")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    asked = parser.parse_args()

    import datasets

    from resilin.bench.results import Report

    datasets.disable_progress_bars()
    cores = len(os.sched_getaffinity(0))  # of this process: `taskset -c 0,1` restricts all contenders alike
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    sources = {"Python source": standard_library(asked.megabytes)}
    if asked.text is not None:
        sources["prose"] = folder_texts(asked.text)
    rows = []
    for name, texts in sources.items():
        with tempfile.TemporaryDirectory() as work:
            rows += measure(name, texts, asked.vocabulary, asked.rounds, cores, Path(work))
    settings = {"vocabulary": asked.vocabulary, "rounds": asked.rounds, "cores": cores, "row": LENGTH}
    print(Report.of("tokenizing", settings, rows).write(asked.output))


if __name__ == "__main__":
    main()
