"""Writes the sample data: `pirate.jsonl`, `general.jsonl`, `broken.jsonl` and their README.

python models/build_samples.py
"""

import argparse
import json
import sys
from pathlib import Path

MODELS = Path(__file__).resolve().parent
sys.path.insert(0, str(MODELS))

README = """\
# Sample data

`pirate.jsonl` holds {number} short conversations whose answers are right and in the manner of a
pirate. About a minute of fine-tuning on it changes how the starter model talks. The file leaves
these questions out, so ask them before and after:

{kept}

`general.jsonl` holds {general} questions of every kind that the starter model knows, with its
plain answers: of the open kinds, questions that it never saw; none is in `pirate.jsonl`. The loss
on it before and after a training says what was forgotten.

`broken.jsonl` is bad on purpose, for trying the checks of data files:

| Line | What is wrong |
| ---: | --- |
{faults}

All are written by `python models/build_samples.py`. Apache-2.0, like the project.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample data for the starter model.")
    parser.add_argument("--output", type=Path, default=MODELS / "samples", metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    from starter_corpus.faults import FAULTS
    from starter_corpus.general import general_conversations
    from starter_corpus.pirate import KEPT_FOR_TRYING, pirate_conversations

    chats = pirate_conversations(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    general = general_conversations(arguments.seed, leave_out=chats)
    for name, conversations in (("pirate", chats), ("general", general)):
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in conversations]
        text = "\n".join(lines) + "\n"
        (arguments.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    bad = "\n".join(line for _, line in FAULTS) + "\n"
    (arguments.output / "broken.jsonl").write_text(bad, encoding="utf-8")
    readme = README.format(
        number=len(chats),
        general=len(general),
        kept="\n".join(f"    {question}" for question in sorted(KEPT_FOR_TRYING)),
        faults="\n".join(f"| {number} | {fault} |" for number, (fault, _) in enumerate(FAULTS, 1)),
    )
    (arguments.output / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
