"""How long a run stands still when a worker is killed, and what is lost: Resilin against torchft and a restart.

The same decoder, workers and kills for all, one after the other in each round. A kill is SIGKILL to one worker, so many
seconds after a step was taken; what is measured is the time from there to the next step that is taken.
- Resilin: `cluster.elastic = true`.
- torchft (`pip install --no-deps torchft-nightly==2026.10.26`, left out where it is not installed): gloo, with its
  defaults (heartbeats lost for 5 s, at most 60 s for others to join), and at its fastest (200 ms).
- torchrun: the whole job is restarted from its last checkpoint, which is as old as the last step; once as Resilin's own
  job that is not elastic, once as a plain loop with torch's FSDP2 that saves with torch's DCP.

One more run of Resilin has a worker killed after every twenty steps: how much of the time goes into steps. In another
one workers have the experts of every layer between them. And in a long one workers are killed, stopped, slowed, drained
and added, drawn from a seed.

    resilin bench run recovery
    resilin bench run recovery --rounds 1 --peers resilin
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from resilin.bench.results import Report, Row, results_name
from resilin.cluster.local import worker_command
from resilin.config import parse_settings, settings_to_toml
from resilin.run.blows import Blow, drawn
from resilin.run.chaos import run_told
from resilin.run.chaos_report import Report as ChaosReport
from resilin.run.chaos_report import compare
from resilin.run.settings import RunSettings

MODEL = {"vocab_size": 4096, "hidden_size": 384, "layers": 5, "heads": 6, "kv_heads": 3, "mlp_size": 1024}
EXPERTS = {"moe": {"experts": 8, "expert_size": 512, "experts_per_token": 2}}
BATCH, LENGTH, AFTER = 8, 64, 0.1
QUIET_STEPS = 40  # of runs that nothing happens to: a step has to be known to a hundredth
STALLED = 120.0


@dataclass
class Seen:
    """What one run showed.

    Attributes:
        recovery: seconds from each kill to the next step.
        step: median seconds of a step before the first kill.
        after: of a step after the last.
        lost: samples that no step has learned from.
        stood: whether it did not go on after a kill, for `STALLED` seconds.
    """

    recovery: list[float] = field(default_factory=list)
    step: float = 0.0
    after: float = 0.0
    lost: int = 0
    stood: bool = False


def paces(times: list[float], kills: list[float]) -> tuple[float, float]:
    before = [t for t in times if t < kills[0]]
    after = [t for t in times if t > kills[-1]][1:]
    # Who stood still after a kill has no pace there.
    found = [statistics.median(b - a for a, b in pairwise(ts)) if len(ts) > 1 else math.nan for ts in (before, after)]
    return found[0], found[1]


def seen(times: list[float], kills: list[float], lost: int) -> Seen:
    recovery = [min(t for t in times if t > at) - at for at in kills]
    return Seen(recovery, *paces(times, kills), lost)


def tree(args: argparse.Namespace, text: Path) -> dict:
    return {
        "source": {
            "paths": [str(text)],
            "sequence_length": LENGTH,
            "tokenizer": {"kind": "bytes"},
            "held_out": {"by": "tail"},
        },
        "model": MODEL,
        "optimizer": {"lr": 1e-3, "schedule": {"use": "resilin.optim.schedule:Constant"}},
        "train": {"steps": args.steps, "batch_size": BATCH, "micro_batch_size": 1, "threads": 1, "device": "cpu"},
        "precision": {"compute": "fp32"},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "live": False},
    }


def kill_steps(args: argparse.Namespace) -> list[int]:
    """After which steps a worker is killed."""
    apart = args.steps // (args.kills + 1)
    return [apart * (number + 1) for number in range(args.kills)]


def of_resilin(args: argparse.Namespace, folder: Path, text: Path) -> tuple[Seen, int]:
    """Resilin, and by how many values it differs from an undisturbed run."""
    made = tree(args, text) | {"parallel": {"workers": args.workers}, "cluster": {"elastic": True}}
    settings = parse_settings(RunSettings, made, "benchmark")
    blows = [Blow(step, AFTER, "kill", 0.5) for step in kill_steps(args)]
    quiet = run_told(settings, folder / "quiet", worker_command())
    struck = run_told(settings, folder / "struck", worker_command(), blows)
    report = compare(quiet, struck)
    if struck.ended:
        raise SystemExit(f"the elastic run ended: {struck.ended}")
    kills = [fell.time for fell in struck.blows]
    return seen(struck.times, kills, report.steps_lost * BATCH), report.bits_changed


def of_experts(args: argparse.Namespace, folder: Path, text: Path) -> tuple[Seen, float]:
    """Workers with experts between them; and by what part a loss differs at most from an undisturbed run's."""
    made = tree(args, text) | {"parallel": {"workers": args.workers, "expert": args.workers}}
    settings = parse_settings(RunSettings, made | {"model": MODEL | EXPERTS, "cluster": {"elastic": True}}, "benchmark")
    blows = [Blow(step, AFTER, "kill", 0.5) for step in kill_steps(args)]
    quiet = run_told(settings, folder / "experts-quiet", worker_command())
    struck = run_told(settings, folder / "experts-struck", worker_command(), blows)
    if struck.ended:
        raise SystemExit(f"the elastic run with experts ended: {struck.ended}")
    lost = compare(quiet, struck).steps_lost * BATCH
    most = max(abs(b[1] / a[1] - 1) for a, b in zip(quiet.losses, struck.losses, strict=True))
    return seen(struck.times, [fell.time for fell in struck.blows], lost), most


def goodput(args: argparse.Namespace, folder: Path, text: Path) -> tuple[float, float, int]:
    """Seconds of the same steps with a worker killed after every twenty, and with none; values that differ."""
    steps = 20 * (args.kills + 1)
    made = tree(args, text) | {"parallel": {"workers": args.workers}, "cluster": {"elastic": True}}
    made["train"] = made["train"] | {"steps": steps}
    settings = parse_settings(RunSettings, made, "benchmark")
    blows = [Blow(20 * (number + 1), AFTER, "kill", 0.5) for number in range(args.kills)]
    quiet = run_told(settings, folder / "goodput-quiet", worker_command())
    struck = run_told(settings, folder / "goodput-struck", worker_command(), blows)
    took = [told.times[-1] - told.times[0] for told in (struck, quiet)]
    return took[0], took[1], compare(quiet, struck).bits_changed


def chaos(args: argparse.Namespace, folder: Path, text: Path) -> ChaosReport:
    """A long run in which workers are killed, stopped, slowed, drained and added, anywhere in a step."""
    made = tree(args, text) | {"parallel": {"workers": args.workers}, "cluster": {"elastic": True, "replace": True}}
    made["train"] = made["train"] | {"steps": 8 * args.blows}
    settings = parse_settings(RunSettings, made, "benchmark")
    blows = drawn(7, 8 * args.blows, args.blows, ("kill", "kill", "stop", "slow", "drain", "add"), 0.5)
    quiet = run_told(settings, folder / "chaos-quiet", worker_command())
    return compare(quiet, run_told(settings, folder / "chaos-struck", worker_command(), blows))


def of_torchrun(args: argparse.Namespace, folder: Path, text: Path) -> Seen:
    """A restart of everything by torchrun, from a checkpoint of every step."""
    made = tree(args, text)
    made["checkpoint"] = {"every": 1, "keep_last": 2}
    file = folder / "run.toml"
    file.write_text(settings_to_toml(parse_settings(RunSettings, made, "benchmark")))
    rest = ["-m", "resilin", "train", str(file), "--folder", str(folder / "run"), "--resume"]
    return restarted(args, folder, rest, folder / "run" / "events.jsonl")


def of_fsdp(args: argparse.Namespace, folder: Path, text: Path) -> Seen:
    """The same of a plain loop with FSDP2 and DCP."""
    told = {"model": MODEL, "batch": BATCH, "length": LENGTH, "steps": args.steps}
    file, output = folder / "fsdp.json", folder / "fsdp.jsonl"
    file.write_text(json.dumps(told))
    script = Path(__file__).parent / "recovery_peers" / "fsdp_dcp.py"
    return restarted(args, folder, [str(script), str(file), str(folder / "checkpoints"), str(output)], output)


def restarted(args: argparse.Namespace, folder: Path, rest: list[str], log: Path) -> Seen:
    """A job of torchrun whose workers are killed; `log` tells of its steps."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.workers), "--max-restarts",
        str(args.kills + 1), "--monitor-interval", "0.1", "--standalone", *rest,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    times: dict[int, float] = {}
    kills: list[float] = []
    with (folder / "torchrun.log").open("wb") as out:
        job = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
        try:
            wanted = kill_steps(args)
            while job.poll() is None:
                time.sleep(0.02)
                for step, at in steps_in(log):
                    times.setdefault(step, at)
                if wanted and max(times, default=0) >= wanted[0]:
                    wanted.pop(0)
                    time.sleep(AFTER)
                    victims = children_of(job.pid)
                    os.kill(victims[len(victims) // 2], signal.SIGKILL)
                    kills.append(time.time())
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    if job.returncode:
        raise SystemExit(f"torchrun ended with {job.returncode}:\n{(folder / 'torchrun.log').read_text()[-3000:]}")
    return seen(sorted(times.values()), kills, 0)


def undisturbed(args: argparse.Namespace, folder: Path, text: Path, elastic: bool) -> float:
    """Seconds of a step that nothing happens to, of workers that may come and go or of those that may not."""
    made = tree(args, text)
    made["train"] |= {"steps": QUIET_STEPS}
    made["cluster"] = {"elastic": elastic}
    folder = folder / ("elastic" if elastic else "plain")
    folder.mkdir()
    file = folder / "run.toml"
    file.write_text(settings_to_toml(parse_settings(RunSettings, made, "benchmark")))
    command = [sys.executable, "-m", "resilin", "train", str(file), "--workers", str(args.workers)]
    subprocess.run([*command, "--folder", str(folder / "run")], check=True, capture_output=True)
    times = [at for _, at in steps_in(folder / "run" / "events.jsonl")]
    return statistics.median(b - a for a, b in pairwise(times))


def steps_in(log: Path) -> list[tuple[int, float]]:
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if told.get("event", "step") == "step":
            found.append((told["step"], told["time"]))
    return found


def children_of(pid: int) -> list[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, told))


def of_torchft(args: argparse.Namespace, folder: Path, fast: bool) -> Seen:
    """Torchft's own loop: each replica a process, the lighthouse in this one."""
    from torchft.coordination import LighthouseServer

    limits = {"join_timeout_ms": 200, "heartbeat_timeout_ms": 200, "quorum_tick_ms": 20} if fast else {}
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, **limits)
    told = {
        "model": MODEL, "batch": BATCH, "length": LENGTH, "replicas": args.workers, "steps": args.steps,
        "timeout": 5.0 if fast else 60.0, "beat_ms": 50 if fast else 100,
    }  # fmt: skip
    file, output = folder / "torchft.json", folder / "torchft.jsonl"
    file.write_text(json.dumps(told))
    script = Path(__file__).parent / "recovery_peers" / "torchft_replica.py"
    environment = {**os.environ, "TORCHFT_LIGHTHOUSE": lighthouse.address(), "OMP_NUM_THREADS": "1"}
    replicas = []
    with (folder / "torchft.log").open("wb") as out:
        for number in range(args.workers):
            command = [sys.executable, str(script), str(file), str(number), str(output)]
            replicas.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        wanted, kills, left = kill_steps(args), [], list(replicas)
        stood, last, newest = False, time.time(), 0
        while any(process.poll() is None for process in left):
            time.sleep(0.02)
            steps = [json.loads(line)["step"] for line in lines_of(output)]
            if max(steps, default=0) > newest:
                newest, last = max(steps), time.time()
            if wanted and newest >= wanted[0]:
                wanted.pop(0)
                time.sleep(AFTER)
                left.pop(len(left) // 2).kill()
                kills.append(time.time())
            if time.time() - last > STALLED:
                print(f"torchft stands still:\n{(folder / 'torchft.log').read_text()[-1500:]}")
                stood = True
                break
        for process in replicas:
            process.kill()
    lighthouse.shutdown()
    first: dict[int, float] = {}
    took: dict[int, int] = {}
    for line in lines_of(output):
        one = json.loads(line)
        first[one["step"]] = min(one["time"], first.get(one["step"], one["time"]))
        took[one["step"]] = one["took_part"]
    lost = sum((args.workers - count) * BATCH // args.workers for count in took.values())
    times = sorted(first.values())
    if stood:
        kills = [at for at in kills if at < times[-1]]  # those it came through
        if not kills:
            return Seen(stood=True)
    return replace(seen(times, kills, lost), stood=stood)


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blows", type=int, default=20, help="of the long run; 0: there is none")
    parser.add_argument("--peers", default="resilin,torchrun,fsdp,torchft,torchft_fast")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    there = importlib.util.find_spec("torchft") is not None
    wanted = [peer for peer in args.peers.split(",") if there or not peer.startswith("torchft")]
    if not there:
        print("torchft is not installed: its rows are left out (pip install --no-deps torchft-nightly==2026.10.26)")
    runs: dict[str, list[Seen]] = {peer: [] for peer in wanted}
    bits, quiet, good, experts = 0, [], [], None
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        text = Path(place) / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
        for number in range(args.rounds):
            for peer in wanted:
                folder = Path(place) / f"{number}-{peer}"
                folder.mkdir()
                if peer == "resilin":
                    quiet.append([undisturbed(args, folder, text, elastic) for elastic in (True, False)])
                    found, differ = of_resilin(args, folder, text)
                    bits += differ
                    if not number:
                        *both, more = goodput(args, folder, text)
                        good.append(both)
                        bits += more
                        experts = of_experts(args, folder, text)
                        print(f"experts: {experts}", flush=True)
                elif peer in ("torchrun", "fsdp"):
                    found = (of_torchrun if peer == "torchrun" else of_fsdp)(args, folder, text)
                else:
                    found = of_torchft(args, folder, peer == "torchft_fast")
                runs[peer].append(found)
                print(f"round {number}: {peer}: {found}", flush=True)
        told = None
        if args.blows and "resilin" in wanted:
            told = chaos(args, Path(place), text)
            print(f"chaos: {told}", flush=True)
    rows = rows_of(runs, quiet, good, bits, args)
    rows += rows_of_experts(*experts, args) if experts is not None else []
    rows += rows_of_chaos(told, args) if told is not None else []
    for row in rows:
        ratio = "" if row.ratio is None else f" ({row.ratio:.2f}x)"
        peer = "" if row.peer is None else f", {row.peer_name} {row.peer:.3g} {row.unit}"
        print(f"{row.name}: {row.ours:.3g} {row.unit}{peer}{ratio}")
    settings = {"workers": args.workers, "kills": args.kills, "steps": args.steps, "rounds": args.rounds,
                "model": MODEL, "batch": BATCH, "length": LENGTH}  # fmt: skip
    print(f"wrote {Report.of(results_name('recovery', 'cpu'), settings, rows).write(args.output)}")


def rows_of_experts(found: Seen, deviation: float, args: argparse.Namespace) -> list[Row]:
    """Of the run whose workers have experts between them."""
    title = f"{args.workers} workers with 8 experts between them, {args.kills} killed"
    beyond = [max(t - found.after, 1e-3) for t in found.recovery]
    return [
        Row(
            name=f"{title}: from a SIGKILL to the next step, what is more than one step",
            unit="s",
            ours=statistics.median(beyond),
            better="lower",
            runs={"ours": beyond},
        ),
        Row(name=f"{title}: samples that no step learns from", unit="samples", ours=float(found.lost), better="lower"),
        Row(
            name=f"{title}: of a loss, the largest part that differs from an undisturbed run",
            unit="", ours=deviation, better="lower",
        ),
    ]  # fmt: skip


def rows_of_chaos(told: ChaosReport, args: argparse.Namespace) -> list[Row]:
    """Of the long run."""
    fell = ", ".join(f"{count} {kind}" for kind, count in told.blows.items())
    title = f"{args.workers} workers, {8 * args.blows} steps, {fell}"
    rows = [
        Row(name=f"{title}: {what}", unit=unit, ours=float(found), better="lower")
        for what, unit, found in (
            ("steps lost", "steps", told.steps_lost),
            ("losses, norms, evaluations and weights that differ", "values", told.bits_changed),
            ("workers given up that were only stopped or slow", "workers", len(told.falsely_lost)),
            ("the run ended early", "runs", bool(told.ended)),
        )
    ]
    for kind, times in told.recovery.items():
        if times:
            name = f"{title}: from a blow ({kind}) to the next step"
            rows.append(Row(name=name, unit="s", ours=statistics.median(times), better="lower", runs={"ours": times}))
    return rows


NAMES = {
    "torchrun": ("torchrun, restart from a checkpoint of every step", 10.0),
    "fsdp": ("torchrun, FSDP2 from a DCP checkpoint of every step", 10.0),
    "torchft": ("torchft, its defaults", 10.0),
    "torchft_fast": ("torchft, 200 ms", 1.0),
}


def rows_of(
    runs: dict[str, list[Seen]], quiet: list[list[float]], good: list[list[float]], bits: int, args: argparse.Namespace
) -> list[Row]:
    """What is told."""
    ours = runs["resilin"]
    title = f"{args.workers} workers, {args.kills} killed"
    times = [t for one in ours for t in one.recovery]
    rows = []
    for peer, (name, target) in NAMES.items():
        theirs = [t for one in runs.get(peer, ()) for t in one.recovery]
        if theirs:
            what = f"{title}: from a SIGKILL to the next step"
            rows.append(Row.from_turns(what, "s", times, theirs, name, better="lower", target=target))
    beyond = [max(t - one.after, 1e-3) for one in ours for t in one.recovery]
    rows.append(
        Row(
            name=f"{title}: of that, what is more than one step",
            unit="s",
            ours=statistics.median(beyond),
            peer=0.25,
            peer_name="the aim",
            better="lower",
            target=1.0,
            runs={"ours": beyond},
        )
    )
    for peer in ("torchft", "torchft_fast"):
        stood, ours_stood = (float(sum(one.stood for one in runs.get(who, ()))) for who in (peer, "resilin"))
        if stood:
            what = f"{title}: of {len(runs[peer])} runs those that stood still for {STALLED:g} s"
            made = {"unit": "runs", "ours": ours_stood, "peer": stood, "peer_name": NAMES[peer][0], "better": "lower"}
            rows.append(Row(name=what, **made))
        theirs_lost = [float(one.lost) for one in runs.get(peer, ()) if not one.stood]
        if theirs_lost:
            ours_lost = [float(one.lost) for one in runs["resilin"]]
            what = f"{title}: samples of {args.steps * BATCH} that no step learns from"
            rows.append(Row.from_turns(what, "samples", ours_lost, theirs_lost, NAMES[peer][0], better="lower"))
    what = f"{title}: losses, norms and weights that differ from those of an undisturbed run"
    rows.append(Row(name=what, unit="values", ours=float(bits), better="lower"))
    if good:
        struck, whole = ([pair[place] for pair in good] for place in (0, 1))
        steps = 20 * (args.kills + 1)
        what = f"{args.workers} workers, one killed after every 20 of {steps} steps: the whole time"
        rows.append(Row.from_turns(what, "s", struck, whole, "none killed", better="lower", target=0.9))
    if quiet:
        elastic, plain = ([pair[place] for pair in quiet] for place in (0, 1))
        what = f"{args.workers} workers, none killed: a step with copies of all states at others"
        rows.append(Row.from_turns(what, "s", elastic, plain, "Resilin, not elastic", better="lower", target=0.95))
    return rows


if __name__ == "__main__":
    main()
