"""Post-training against trl: SFT and DPO tokens a second, GRPO prompts a second with its answers; same model and data.

Every contender holds its own copy of the same small Llama and the same rows (signatures of the standard library and
their docstrings). Both sides of a comparison live in this process and take a block of steps each in turn, so that a
busy machine disturbs both alike. Tokens are real ones: padding is nobody's achievement.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilin.bench.results import Row

PEER = "trl"
LENGTH, ROWS, PAIRS, PROMPTS, GROUP, ANSWER = 256, 8, 4, 4, 8, 64
BLOCK = 3
POOL = 96
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)


def texts(count: int) -> list[tuple[str, str]]:
    """Signatures and docstrings of the standard library, in the order of its files."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)) and 20 < len(said) < 700:
                found.append((f"def {node.name}({ast.unparse(node.args)}):", said))
                if len(found) == count:
                    return found
    return found


def prepare(folder: Path) -> list[tuple[str, str]]:
    """Rows, tokenizer and model, as files that both sides open."""
    from resilin.data.train_tokenizer import train_bpe
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.huggingface import save_pretrained
    from resilin.models.settings import ModelContext

    rows = texts(768)
    tokenizer = train_bpe([" ".join(row) for row in rows], 8192)
    tokenizer.config["chat_template"] = TEMPLATE
    settings = DecoderSettings(
        hidden_size=256, layers=6, heads=8, mlp_size=704, tie_embeddings=True, max_positions=1024
    )
    model = settings.build(ModelContext(0, tokenizer.vocab_size))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    save_pretrained(model, folder / "model", special_ids=ids)
    tokenizer.save(folder / "model")
    lines: dict[str, list[dict[str, Any]]] = {"chats": [], "pairs": [], "prompts": []}
    for number, (ask, said) in enumerate(rows):
        user = {"role": "user", "content": ask}
        answers = [{"role": "assistant", "content": text} for text in (said, rows[number - 1][1])]
        lines["chats"].append({"messages": [user, answers[0]]})
        if number < POOL:  # both sides compute the reference of all pairs before they start
            lines["pairs"].append({"prompt": [user], "chosen": answers[:1], "rejected": answers[1:]})
        lines["prompts"].append({"prompt": [user], "ground_truth": "a", "dataset": "string_f1"})
    for name, made in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
    return rows


class Ours:
    """A run that takes steps when asked."""

    def __init__(self, folder: Path, options: argparse.Namespace, **tree: Any) -> None:
        from resilin.run.build import build_run
        from resilin.run.settings import RunSettings

        train = {"steps": 10**5, "device": options.device, "threads": options.threads, **tree.pop("train")}
        common = {
            "model": {"use": "resilin.models.pretrained:Pretrained", "path": str(folder / "model")},
            "optimizer": {"lr": 1e-5, "weight_decay": 0.0, "schedule": {"use": "resilin.optim.schedule:Constant"}},
            "precision": {"compute": "fp32"},
            "evaluation": {"every": 0},
            "train": train,
        }
        self.run = build_run(RunSettings.model_validate({**common, **tree}))
        self.per_step: float | None = None
        """Units of a step, where they are not those of the peer."""

    def steps(self, count: int) -> float:
        """Seconds of some steps."""
        began = time.perf_counter()
        for _ in range(count):
            self.run._take_step()
        return time.perf_counter() - began


class Theirs:
    """A trainer of trl in a thread of its own, which waits after each step until it is asked for more."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        from transformers import TrainerCallback

        go, done = threading.Semaphore(0), threading.Semaphore(0)

        class Wait(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                go.acquire()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                done.release()

        self._go, self._done = go, done
        self.trainer = make(Wait())
        threading.Thread(target=self.trainer.train, daemon=True).start()

    def steps(self, count: int) -> float:
        """Seconds of some steps."""
        began = time.perf_counter()
        for _ in range(count):
            self._go.release()
            self._done.acquire()
        return time.perf_counter() - began


def arguments(folder: Path, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What every trainer of trl is told."""
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": options.device == "cpu",
        "max_steps": 10**5,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        **more,
    }


def peer_parts(folder: Path, name: str) -> dict[str, Any]:
    """Model, tokenizer and rows as trl takes them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder / "model"),
        "processing_class": AutoTokenizer.from_pretrained(folder / "model"),
        "train_dataset": Dataset.from_list(lines),
    }


def sft_tokens(folder: Path) -> float:
    """Mean real inputs of a conversation, as either side reads it."""
    from resilin.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "model")
    lines = (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    sizes = [min(LENGTH, len(tokenizer.chat(json.loads(line)["messages"]).ids) - 1) for line in lines]
    return sum(sizes) / len(sizes)


def pair_tokens(folder: Path) -> float:
    """Mean real inputs of both rows of a pair."""
    from resilin.data.tokenizer import Tokenizer

    tokenizer, total = Tokenizer.load(folder / "model"), 0
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for side in ("chosen", "rejected"):
            total += min(LENGTH, len(tokenizer.chat([*line["prompt"], *line[side]]).ids) - 1)
    return total / len(lines)


def sft(folder: Path, options: argparse.Namespace) -> tuple[Ours, Theirs]:
    """Fine-tuning on answers only."""
    from trl import SFTConfig, SFTTrainer

    source = {
        "use": "resilin.data.chat_source:ChatSource", "paths": [str(folder / "chats.jsonl")],
        "tokenizer": {"path": str(folder / "model")}, "sequence_length": LENGTH, "long_documents": "truncate",
        "workers": 1, "cache": str(folder / "cache"),
    }  # fmt: skip
    # Conversations are packed, which is the default; so many rows hold about as many tokens as ROWS conversations.
    rows = max(1, round(ROWS * sft_tokens(folder) / (0.85 * LENGTH)))
    ours = Ours(folder, options, source=source, train={"batch_size": rows})
    batches = [ours.run.source.fetch(step, range(rows)) for step in range(8)]
    ours.per_step = sum(float((batch["documents"] >= 0).sum()) for batch in batches) / len(batches)
    config = SFTConfig(
        **arguments(folder, options, per_device_train_batch_size=ROWS),
        max_length=LENGTH, assistant_only_loss=True, packing=False,
    )  # fmt: skip
    parts = peer_parts(folder, "chats")
    return ours, Theirs(lambda wait: SFTTrainer(args=config, callbacks=[wait], **parts))


def dpo(folder: Path, options: argparse.Namespace, cached: bool) -> tuple[Ours, Theirs]:
    """DPO with the reference computed before, or at every step."""
    from trl import DPOConfig, DPOTrainer

    source = {
        "use": "resilin.data.preference_source:PreferenceSource", "paths": [str(folder / "pairs.jsonl")],
        "tokenizer": str(folder / "model"), "sequence_length": LENGTH,
    }  # fmt: skip
    objective = {
        "use": "resilin.posttrain.preference_loss:Preference", "loss": "dpo",
        "reference": "cached" if cached else "live",
    }  # fmt: skip
    ours = Ours(folder, options, source=source, objective=objective, train={"batch_size": PAIRS, "steps": 200})
    config = DPOConfig(
        **arguments(folder, options, per_device_train_batch_size=PAIRS),
        max_length=LENGTH + 1, beta=0.1, precompute_ref_log_probs=cached,
    )  # fmt: skip
    parts = peer_parts(folder, "pairs")
    return ours, Theirs(lambda wait: DPOTrainer(args=config, callbacks=[wait], **parts))


def grpo(folder: Path, options: argparse.Namespace) -> tuple[Ours, Theirs]:
    """Groups of answers, a KL penalty, one update a rollout; the reward is the share of the letter a."""
    from trl import GRPOConfig, GRPOTrainer

    source = {
        "use": "resilin.posttrain.rollouts:Rollouts", "samples_per_prompt": GROUP, "max_new_tokens": ANSWER,
        "non_stop_penalty": "verifier", "prompts": {
            "use": "resilin.data.prompt_source:PromptSource", "paths": [str(folder / "prompts.jsonl")],
            "tokenizer": str(folder / "model"),
        },
    }  # fmt: skip
    objective = {"use": "resilin.posttrain.grpo:Grpo", "beta": 0.01}
    ours = Ours(folder, options, source=source, objective=objective, train={"batch_size": PROMPTS * GROUP})
    config = GRPOConfig(
        **arguments(folder, options, per_device_train_batch_size=PROMPTS * GROUP),
        num_generations=GROUP, max_completion_length=ANSWER, beta=0.01, temperature=1.0,
    )  # fmt: skip

    def share(completions: list[Any], **_: Any) -> list[float]:
        said = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [text.count("a") / max(len(text), 1) for text in said]

    parts = peer_parts(folder, "prompts")
    return ours, Theirs(lambda wait: GRPOTrainer(args=config, reward_funcs=share, callbacks=[wait], **parts))


def in_turns(pair: tuple[Ours, Theirs], rounds: int, per_step: float) -> tuple[list[float], list[float]]:
    """Units a second of both sides, round by round; the first round warms up."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for side, speeds in zip(pair, found, strict=True):
            seconds = side.steps(BLOCK)
            if turn:
                units = getattr(side, "per_step", None) or per_step
                speeds.append(BLOCK * units / seconds)
    return found


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The measured rows."""
    import torch

    from resilin.bench.results import Row

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        chat, pair = sft_tokens(folder) * ROWS, pair_tokens(folder) * PAIRS
        plans: list[tuple[str, str, Callable[[], tuple[Ours, Theirs]], float, float]] = [
            ("SFT, answers only", "tokens/s", lambda: sft(folder, options), chat, 1.2),
            ("DPO, reference computed before", "tokens/s", lambda: dpo(folder, options, True), pair, 1.2),
            ("DPO, live reference", "tokens/s", lambda: dpo(folder, options, False), pair, 1.2),
            ("GRPO with its answers", "prompts/s", lambda: grpo(folder, options), PROMPTS, 1.5),
        ]
        for name, unit, make, per_step, target in plans:
            ours, theirs = in_turns(make(), options.rounds, per_step)
            yield Row.from_turns(name, unit, ours, theirs, PEER, target=target)
