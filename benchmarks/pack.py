"""How long a text takes to become batches, how much memory, and how full the rows are.

    python benchmarks/pack.py TEXT TOKENIZER [--tokens 512] [--workers 0] [--json FILE]

Each way of packing is measured in a process of its own, with an empty cache: the time until the
first batch stands there, and the largest memory of the process (and of the largest of those that it
started, if the text is large enough for several). Then a second start, which finds the cache. The
time of importing libraries is not counted, that of loading the tokenizer is.

TEXT is a file or a directory, TOKENIZER a directory or a Hub name. Two rows of numbers are also
made of the same text as one single line, for which a tokenizer likes to take gigabytes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKINGS = ("full", "none", "documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--workers", type=int, default=0, help="processes that tokenise")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments, arguments.child)))
        return

    results = []
    with tempfile.TemporaryDirectory() as directory:
        one_line = Path(directory, "one_line.txt")
        one_line.write_bytes(arguments.text.read_bytes().replace(b"\n", b" "))
        runs = [(arguments.text, packing) for packing in PACKINGS] + [(one_line, "full")]
        print(
            f"{'text':<14}{'packing':<11}{'first batch s':>14}{'tokens/s':>12}{'fill':>8}"
            f"{'memory MB':>11}{'second start s':>16}"
        )
        for number, (text, packing) in enumerate(runs):
            cache = {**os.environ, "HF_DATASETS_CACHE": str(Path(directory, f"cache{number}"))}
            first, second = (run_child(arguments, text, packing, cache) for _ in range(2))
            results.append({"text": text.name, "packing": packing, **first, "second": second})
            print(
                f"{text.name[:13]:<14}{packing:<11}{first['seconds']:>14.1f}"
                f"{first['tokens'] / first['seconds']:>12,.0f}{first['fill']:>8.2%}"
                f"{first['megabytes']:>11.0f}{second['seconds']:>16.2f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def run_child(
    arguments: argparse.Namespace, text: Path, packing: str, environment: dict[str, str]
) -> dict[str, float]:
    command = [sys.executable, __file__, str(text), arguments.tokenizer, "--child", packing]
    command += ["--tokens", str(arguments.tokens), "--workers", str(arguments.workers)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(arguments: argparse.Namespace, packing: str) -> dict[str, float]:
    """Return what it took to the first batch, in this process."""
    import datasets

    from annotated_mpnet.config import ObjectiveConfig
    from annotated_mpnet.data import (
        BatchLoader,
        DataCollatorForMaskedPermutedLanguageModeling,
        LocalFiles,
        Vocabulary,
        load_tokenizer,
        pack_rows,
    )

    datasets.disable_progress_bars()
    start = time.perf_counter()
    tokenizer = load_tokenizer(arguments.tokenizer)
    source = LocalFiles.find(arguments.text, "TEXT")
    rows = pack_rows(
        source, tokenizer, arguments.tokens, packing=packing, num_workers=arguments.workers
    )
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        Vocabulary.of(tokenizer), ObjectiveConfig(), arguments.tokens, seed=1, packing=packing
    )
    BatchLoader(rows, collator, batch_size=16, seed=1).batch(0)
    seconds = time.perf_counter() - start
    used = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    report = rows.report
    return {
        "seconds": seconds,
        "tokens": report.tokens,
        "fill": report.fill,
        "rows": report.rows,
        "megabytes": max(used),
    }


if __name__ == "__main__":
    main()
