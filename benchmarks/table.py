"""`python -m benchmarks.table FILE...`: kept results as a Markdown table, the README's."""

import json
import sys
from pathlib import Path


def table(files: list[str]) -> str:
    rows = [row for file in files for row in json.loads(Path(file).read_text())]
    lines = ["| measure | ours | against | times better | unit | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        numbers = ("" if row[key] is None else f"{row[key]:,.4g}" for key in ("ours", "baseline", "ratio"))
        lines.append(f"| {row['name']} | {' | '.join(numbers)} | {row['unit']} | {row['note']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
