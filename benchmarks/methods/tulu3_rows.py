"""Post-training against trl: SFT and DPO tokens a second, GRPO prompts a second with its answers; same model and data.

Every contender holds its own copy of the same small Llama and the same rows (signatures of the standard library and
their docstrings). The two sides of a comparison take a block of steps each in turn, so that a busy machine disturbs
both alike; trl lives in a process of its own, in its main thread, as its users run it. Tokens are real ones that have a
successor, counted in the very batches that were learnt: padding is nobody's achievement.

What trl is told is what its users would say for speed on this machine: no checkpointing of activations, the fused
optimizer, the fused output layer (its default). Its SFT pads rows, which is its default too: its packing is meant for
FlashAttention, which CPUs do not have. The row with rows grouped by length (an option of its trainer that draws other
batches) is the hardest contender, and stands beside the default. On a CPU all is float32; on a GPU the model and the
batches are larger, and products are in bfloat16, by autocast.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilin.bench.results import Row
    from resilin.nouns import Batch

PEER = "trl"
LENGTH, PROMPTS, GROUP, ANSWER = 256, 4, 8, 64
ROWS, PAIRS = {"cpu": 8, "cuda": 32}, {"cpu": 4, "cuda": 16}
SMALL = {"hidden_size": 256, "layers": 6, "heads": 8, "mlp_size": 704}
LARGE = {"hidden_size": 1024, "layers": 12, "heads": 16, "mlp_size": 2816}
SIZES = {"cpu": SMALL, "cuda": LARGE}
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


def prepare(folder: Path, device: str = "cpu") -> list[tuple[str, str]]:
    """Rows, tokenizer and model, as files that both sides open."""
    from resilin.data.train_tokenizer import train_bpe
    from resilin.models.decoder_settings import DecoderSettings
    from resilin.models.huggingface import save_pretrained
    from resilin.models.settings import ModelContext

    rows = texts(768)
    tokenizer = train_bpe([" ".join(row) for row in rows], 8192)
    tokenizer.config["chat_template"] = TEMPLATE
    settings = DecoderSettings(**SIZES[device], tie_embeddings=True, max_positions=1024)
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


Units = Callable[["Batch"], float]


class Ours:
    """A run that takes steps when asked."""

    def __init__(self, folder: Path, options: argparse.Namespace, units: Units, **tree: Any) -> None:
        from resilin.run.build import build_run
        from resilin.run.settings import RunSettings

        train = {"steps": 10**5, "device": options.device, "threads": options.threads, **tree.pop("train")}
        common = {
            "model": {"use": "resilin.models.pretrained:Pretrained", "path": str(folder / "model")},
            "optimizer": {"lr": 1e-5, "weight_decay": 0.0, "schedule": {"use": "resilin.optim.schedule:Constant"}},
            "precision": {"compute": "bf16" if options.device == "cuda" else "fp32"},
            "evaluation": {"every": 0},
            "train": train,
        }
        self.run = build_run(RunSettings.model_validate({**common, **tree}))
        self._units, self._batches = units, []  # type: ignore[var-annotated]
        fetch = self.run.source.fetch

        def remembered(step: int, slots: Any) -> Batch:
            self._batches.append(fetch(step, slots))
            return self._batches[-1]  # type: ignore[no-any-return]

        self.run.source.fetch = remembered  # type: ignore[method-assign]

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds of some steps, and the units they learnt from."""
        self._batches.clear()
        began = time.perf_counter()
        for _ in range(count):
            self.run._take_step()
        seconds = time.perf_counter() - began
        return seconds, sum(self._units(batch) for batch in self._batches[-count:])


class Theirs:
    """A trainer of trl in a process of its own, which waits after each block of steps until it is asked for more."""

    def __init__(self, kind: str, folder: Path, options: argparse.Namespace) -> None:
        told = json.dumps({"device": options.device, "threads": options.threads})
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, str(folder), told],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._waits = False

    def ready(self) -> None:
        """Return once the trainer waits for its first steps."""
        if not self._waits:
            self._answer()
            self._waits = True

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"trl's process ended:\n{self._errors.read().decode()[-4000:]}")
        return line

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds of some steps, and the units they learnt from."""
        assert self._process.stdin is not None
        began = time.perf_counter()
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        units = float(self._answer())
        return time.perf_counter() - began, units

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve(kind: str, folder: Path, options: argparse.Namespace) -> None:
    """What trl's process does: so many steps for each line that says how many, answered with their units."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(options.threads)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print is no answer

    class Serve(TrainerCallback):
        left, asked, seen = 0, 0, 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.left:
                answers.write("ready\n" if state.global_step == 0 else f"{self.units(args, state)}\n")
                line = sys.stdin.readline()
                if not line:
                    os._exit(0)
                self.left = self.asked = int(line)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if not self.left and args.device.type == "cuda":
                torch.cuda.synchronize()

        def units(self, args: Any, state: Any) -> float:
            if kind == "grpo":
                return float(PROMPTS * self.asked)
            tokens, self.seen = int(state.num_input_tokens_seen) - self.seen, int(state.num_input_tokens_seen)
            rows = args.per_device_train_batch_size * (2 if kind.startswith("dpo") else 1)
            return float(tokens - rows * self.asked)  # the last token of a row has no successor

    PEERS[kind](folder, options, Serve()).train()


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
        "bf16": options.device == "cuda",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "include_num_input_tokens_seen": "non_padding",
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


def sft_units(batch: Batch) -> float:
    """Tokens with a successor in their own conversation."""
    documents = batch["documents"]
    return float(((documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)).sum())


def pair_units(batch: Batch) -> float:
    """The same in both rows of all pairs; a row ends with its last label."""
    total = 0
    for side in ("chosen", "rejected"):
        has_label = batch[f"{side}_labels"] != -100
        total += int(sum(int(row.nonzero().max()) + 1 for row in has_label))
    return float(total)


def sft(folder: Path, options: argparse.Namespace) -> Ours:
    """Fine-tuning on answers only, conversations packed (the default): about as many tokens as trl's rows."""
    from resilin.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "model")
    lines = (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    sizes = [min(LENGTH, len(tokenizer.chat(json.loads(line)["messages"]).ids)) for line in lines]
    rows = max(1, round(ROWS[options.device] * sum(sizes) / len(sizes) / (0.85 * LENGTH)))
    source = {
        "use": "resilin.data.chat_source:ChatSource", "paths": [str(folder / "chats.jsonl")],
        "tokenizer": {"path": str(folder / "model")}, "sequence_length": LENGTH, "long_documents": "truncate",
        "workers": 1, "cache": str(folder / "cache"),
    }  # fmt: skip
    return Ours(folder, options, sft_units, source=source, train={"batch_size": rows})


def trl_sft(folder: Path, options: argparse.Namespace, wait: Any, **more: Any) -> Any:
    """The same by trl, padded."""
    from trl import SFTConfig, SFTTrainer

    more = {"per_device_train_batch_size": ROWS[options.device], "packing": False, **more}
    config = SFTConfig(**arguments(folder, options, **more), max_length=LENGTH, assistant_only_loss=True)
    return SFTTrainer(args=config, callbacks=[wait], **peer_parts(folder, "chats"))


def trl_sft_grouped(folder: Path, options: argparse.Namespace, wait: Any) -> Any:
    """The same with rows of similar length in a batch."""
    return trl_sft(folder, options, wait, train_sampling_strategy="group_by_length")


def dpo(folder: Path, options: argparse.Namespace, reference: str) -> Ours:
    """DPO with the reference computed before, or at every step."""
    source = {
        "use": "resilin.data.preference_source:PreferenceSource", "paths": [str(folder / "pairs.jsonl")],
        "tokenizer": str(folder / "model"), "sequence_length": LENGTH,
    }  # fmt: skip
    objective = {"use": "resilin.posttrain.preference_loss:Preference", "loss": "dpo", "reference": reference}
    train = {"batch_size": PAIRS[options.device], "steps": 200}
    return Ours(folder, options, pair_units, source=source, objective=objective, train=train)


def trl_dpo(folder: Path, options: argparse.Namespace, wait: Any, *, cached: bool = False) -> Any:
    """The same by trl."""
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        **arguments(folder, options, per_device_train_batch_size=PAIRS[options.device]),
        max_length=LENGTH + 1, beta=0.1, precompute_ref_log_probs=cached,
    )  # fmt: skip
    return DPOTrainer(args=config, callbacks=[wait], **peer_parts(folder, "pairs"))


def trl_dpo_cached(folder: Path, options: argparse.Namespace, wait: Any) -> Any:
    """The same with the reference computed before."""
    return trl_dpo(folder, options, wait, cached=True)


def grpo(folder: Path, options: argparse.Namespace) -> Ours:
    """Groups of answers, a KL penalty, one update a rollout; the reward is the share of the letter a."""
    source = {
        "use": "resilin.posttrain.rollouts:Rollouts", "samples_per_prompt": GROUP, "max_new_tokens": ANSWER,
        "non_stop_penalty": "verifier", "prompts": {
            "use": "resilin.data.prompt_source:PromptSource", "paths": [str(folder / "prompts.jsonl")],
            "tokenizer": str(folder / "model"),
        },
    }  # fmt: skip
    objective = {"use": "resilin.posttrain.grpo:Grpo", "beta": 0.01}
    train = {"batch_size": PROMPTS * GROUP}
    return Ours(folder, options, lambda batch: PROMPTS, source=source, objective=objective, train=train)


def trl_grpo(folder: Path, options: argparse.Namespace, wait: Any) -> Any:
    """The same by trl."""
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        **arguments(folder, options, per_device_train_batch_size=PROMPTS * GROUP),
        num_generations=GROUP, max_completion_length=ANSWER, beta=0.01, temperature=1.0,
    )  # fmt: skip

    def share(completions: list[Any], **_: Any) -> list[float]:
        said = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [text.count("a") / max(len(text), 1) for text in said]

    return GRPOTrainer(args=config, reward_funcs=share, callbacks=[wait], **peer_parts(folder, "prompts"))


PEERS: dict[str, Callable[[Path, argparse.Namespace, Any], Any]] = {
    "sft": trl_sft,
    "sft_grouped": trl_sft_grouped,
    "dpo": trl_dpo,
    "dpo_cached": trl_dpo_cached,
    "grpo": trl_grpo,
}


def in_turns(ours: Ours, theirs: Theirs, rounds: int) -> tuple[list[float], list[float]]:
    """Units a second of both sides, round by round; the first round warms up."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for side, speeds in zip((ours, theirs), found, strict=True):
            seconds, units = side.steps(BLOCK)
            if turn:
                speeds.append(units / seconds)
    return found


Plan = tuple[str, str, Callable[[Path, argparse.Namespace], Ours], str, float]
PLANS: tuple[Plan, ...] = (
    ("SFT, answers only", "tokens/s", sft, "sft", 1.2),
    ("SFT, trl's rows grouped by length", "tokens/s", sft, "sft_grouped", 1.2),
    ("DPO, reference computed before", "tokens/s", lambda *a: dpo(*a, "cached"), "dpo_cached", 1.2),
    ("DPO, live reference", "tokens/s", lambda *a: dpo(*a, "live"), "dpo", 1.2),
    ("GRPO with its answers", "prompts/s", grpo, "grpo", 1.5),
)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The measured rows."""
    import torch

    from resilin.bench.results import Row

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, options.device)
        # A trainer that waits takes no processor time. Two CPU cores lack the memory for all at once.
        ahead = {plan[3]: Theirs(plan[3], folder, options) for plan in PLANS if options.device == "cuda"}
        for other in ahead.values():
            other.ready()
        for name, unit, make, peer, target in PLANS:
            theirs = ahead.get(peer) or Theirs(peer, folder, options)
            try:
                theirs.ready()
                mine, others = in_turns(make(folder, options), theirs, options.rounds)
            finally:
                theirs.close()
            yield Row.from_turns(name, unit, mine, others, PEER, target=target)


if __name__ == "__main__":
    which, where, told = sys.argv[1:]
    serve(which, Path(where), argparse.Namespace(**json.loads(told)))
