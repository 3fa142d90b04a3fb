"""Makes the starter model from nothing: corpus, tokenizer, pre-training, 4 bits, model card.

    python models/build_starter.py

The same seed and the same number of steps give the same corpus, tokenizer and training batches.
Needs torch beside the packages of dora_mlx: on a CPU it trains this network three to five times
faster than mlx does. The shipped model took 72 minutes on two shared cores.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

MODELS = Path(__file__).resolve().parent
sys.path.insert(0, str(MODELS))

STEPS = 2800


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make the starter model: corpus, tokenizer, pre-training, 4 bits, card."
    )
    parser.add_argument("--output", type=Path, default=MODELS / "starter", metavar="FOLDER")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/starter"),
        metavar="FOLDER",
        help="tokenizer, checkpoints and log; a run that was stopped goes on from here "
        "(default: build/starter)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps of 4096 tokens (default: {STEPS})"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="rough length of the run instead of --steps: the speed of this machine is measured "
        "first and turned into a number of steps",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--export-only", action="store_true", help="write the model from the last checkpoint"
    )
    return parser.parse_args()


def reporter(log: Path) -> Callable[[str], None]:
    """Prints each line and keeps it in the log."""

    def report(line: str) -> None:
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")

    return report


def main() -> None:
    arguments = parse_arguments()
    import torch
    from starter_training.pretraining import Plan, pretrain, steps_in
    from starter_training.tokens import train_tokenizer

    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    report = reporter(arguments.work / "log.txt")
    tokenizer = train_tokenizer(arguments.work / "tokenizer", arguments.seed)
    checkpoint = arguments.work / "checkpoint.pt"
    if not arguments.export_only:
        steps = arguments.steps
        if arguments.minutes:
            steps = steps_in(arguments.minutes, tokenizer, arguments.seed)
        pretrain(tokenizer, Plan(steps, arguments.seed), checkpoint, report)

    from starter_training.publishing import publish

    publish(checkpoint, arguments.work / "tokenizer", arguments.output, report)


if __name__ == "__main__":
    main()
