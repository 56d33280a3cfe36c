"""Collect Python source into JSON lines: every distinct .py file below a folder (default: site-packages).

python benchmarks/python_source.py data/python.jsonl [FOLDER]
"""

import hashlib
import json
import os
import random
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    out = Path(sys.argv[1])
    root = Path(sys.argv[2] if len(sys.argv) > 2 else sysconfig.get_paths()["purelib"])
    seen, records = set(), []
    for folder, _, names in sorted(os.walk(root)):
        for name in sorted(names):
            if not name.endswith(".py"):
                continue
            path = Path(folder) / name
            try:
                text = path.read_text(encoding="utf8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.md5(text.encode()).digest()
            # Files of a few lines are mostly empty packages, files over 200 kB mostly generated tables.
            if 200 < len(text) < 200_000 and digest not in seen and "\0" not in text:
                seen.add(digest)
                records.append({"title": str(path.relative_to(root)), "text": text})
    random.Random(0).shuffle(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    with temporary.open("w", encoding="utf8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    temporary.replace(out)
    print(f"{len(records)} files, {sum(len(r['text']) for r in records) / 1e6:.0f} MB -> {out}")


if __name__ == "__main__":
    main()
