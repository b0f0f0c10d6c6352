"""Post-training, adapters, sparsity, steered data and multigrid against their peers, same model and data, in turns.

Each method's contenders are in `benchmarks/methods/<slug>_rows.py`, as a function `rows(options)`; each is measured in
a process of its own, so that none profits from or pays for what another left behind.

    resilin bench run methods
    resilin bench run methods --only bone tulu3 --rounds 3
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
FOLDER = HERE / "methods"
SUFFIX = "_rows"  # a module called `ast` would stand before the standard library's for whatever runs from the folder
SLUGS = sorted(path.stem.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}.py"))


def module_of(slug: str) -> ModuleType:
    """The contenders of one method."""
    spec = importlib.util.spec_from_file_location(f"methods_{slug}", FOLDER / f"{slug}{SUFFIX}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Measure and write results/methods.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=SLUGS, choices=SLUGS, help="these methods; the other rows stay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", help="the results file; default: methods, methods-cuda on a GPU")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.rows_to is not None:
        import torch

        torch.set_num_threads(options.threads)
        (slug,) = options.only
        found = [row.model_dump(mode="json", exclude={"ratio", "met"}) for row in module_of(slug).rows(options)]
        options.rows_to.write_text(json.dumps(found), encoding="utf-8")
        return

    from resilin.bench.results import Report, Row, read_report, results_name

    name = options.name or results_name("methods", options.device)
    file = options.output / f"{name}.json"
    before = read_report(file) if file.exists() else None
    kept = [row for row in (before.rows if before else []) if row.name.split(":")[0] not in options.only]
    measured: dict[str, list[Row]] = {}
    for slug in options.only:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            rows_file = Path(temporary) / "rows.json"
            command = [sys.executable, __file__, "--only", slug, "--rounds", str(options.rounds)]
            command += ["--threads", str(options.threads), "--device", options.device, "--rows-to", str(rows_file)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, check=True, env=environment)
            rows = [Row.model_validate(row) for row in json.loads(rows_file.read_text(encoding="utf-8"))]
        measured[slug] = [row.model_copy(update={"name": f"{slug}: {row.name}"}) for row in rows]
        print(f"{slug}: {len(rows)} rows in {time.perf_counter() - began:.0f} s", flush=True)
        # Written after each, so that a stop loses only what was under way.
        done = [*kept, *(row for rows in measured.values() for row in rows)]
        together = sorted(done, key=lambda row: row.name.split(":")[0])
        slugs = sorted({row.name.split(":")[0] for row in together})
        settings = {"methods": slugs, "rounds": options.rounds, "threads": options.threads, "device": options.device}
        Report.of(name, settings, together).write(options.output)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
