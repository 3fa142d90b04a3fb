"""Pre-trains the network on the corpus, on a CPU, with checkpoints to go on from."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from starter_corpus.conversation import conversations
from tokenizers import Tokenizer
from torch import Tensor, nn

from starter_training.network import Llama
from starter_training.tokens import encode

POOL = 4096  # conversations sorted by length together, so that batches need little padding
LONGEST = 384  # tokens
PROMPT_SHARE = 0.1  # of the prompt tokens are predicted too, so that these are not unknown
CHECK_POOL = 1_000_000  # a pool that training never reaches


@dataclass(frozen=True)
class Plan:
    steps: int
    seed: int
    batch_tokens: int = 4096
    warm_up: int = 100
    decay: float = 0.64  # share of the steps over which the rate falls to zero
    finishing: float = 2 / 7  # share of the last steps that are on the finishing corpus
    rounded: float = 0.2  # share of the last steps that see the weights in 4 bits
    matrix_rate: float = 5e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.05

    def rate_at(self, step: int) -> float:
        """The share of the full learning rate."""
        left = (self.steps - step) / (self.steps * self.decay)
        return min(1.0, (step + 1) / self.warm_up, left)

    def is_finishing(self, step: int) -> bool:
        return step >= round(self.steps * (1 - self.finishing))

    def is_rounded(self, step: int) -> bool:
        return step >= self.steps * (1 - self.rounded)


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # (batch, length)
    wanted: Tensor  # flat positions that predict
    targets: Tensor
    size: int  # tokens without padding


def _pack(rng: random.Random, group: list[tuple[list[int], list[bool]]], share: float) -> Batch:
    length = max(len(tokens) for tokens, _ in group) - 1
    table = torch.zeros(len(group), length, dtype=torch.long)
    wanted: list[int] = []
    targets: list[int] = []
    for row, (tokens, said) in enumerate(group):
        table[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        for place in range(len(tokens) - 1):
            if said[place + 1] or (share and rng.random() < share):
                wanted.append(row * length + place)
                targets.append(tokens[place + 1])
    size = sum(len(tokens) for tokens, _ in group)
    return Batch(table, torch.tensor(wanted), torch.tensor(targets), size)


def pool_batches(
    tokenizer: Tokenizer, plan: Plan, pool: int, finishing: bool, share: float = PROMPT_SHARE
) -> list[Batch]:
    """The batches of one pool of conversations; a pool depends on nothing but its number."""
    rng = random.Random(f"{plan.seed} {pool}")
    chats = itertools.islice(conversations(rng.getrandbits(64), finishing), POOL)
    encoded = [encode(tokenizer, messages) for messages in chats]
    encoded = [pair for pair in encoded if len(pair[0]) <= LONGEST]
    encoded.sort(key=lambda pair: len(pair[0]) + rng.random())
    groups: list[list[tuple[list[int], list[bool]]]] = [[]]
    for pair in encoded:
        # Sorted by length, so the newest is the longest of its group.
        if len(pair[0]) * (len(groups[-1]) + 1) > plan.batch_tokens:
            groups.append([])
        groups[-1].append(pair)
    rng.shuffle(groups)
    return [_pack(rng, group, share) for group in groups]


def _optimizers(network: Llama, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding and the norms."""
    matrices, others = [], []
    for name, weight in network.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    muon = torch.optim.Muon(
        matrices,
        lr=plan.matrix_rate,
        weight_decay=plan.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        others, lr=plan.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    return [muon, adam]


def _loss(network: Llama, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(batch.tokens, batch.wanted)
    return F.cross_entropy(logits.float(), batch.targets)


@torch.no_grad()
def held_out_loss(network: Llama, tokenizer: Tokenizer, plan: Plan, finishing: bool) -> float:
    """Mean loss per answer token on conversations that training never sees."""
    total = count = 0.0
    for batch in pool_batches(tokenizer, plan, CHECK_POOL, finishing, share=0.0)[:16]:
        total += _loss(network, batch).item() * len(batch.targets)
        count += len(batch.targets)
    return total / count


@dataclass
class Progress:
    step: int = 0
    pool: int = 0
    place: int = 0  # batch within the pool
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def _save(file: Path, network: Llama, optimizers: list, progress: Progress) -> None:
    state = {
        "network": network.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": vars(progress),
    }
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def _load(file: Path, network: Llama, optimizers: list) -> Progress:
    state = torch.load(file, weights_only=True)
    network.load_state_dict(state["network"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def _batches_from(tokenizer: Tokenizer, plan: Plan, progress: Progress) -> Iterator[Batch]:
    """Batches from where the progress stands, which it counts on."""
    while True:
        pool = progress.pool
        batches = pool_batches(tokenizer, plan, pool, plan.is_finishing(progress.step))
        for batch in batches[progress.place :]:
            progress.place += 1
            yield batch
            if progress.pool != pool:
                break
        else:
            progress.pool, progress.place = pool + 1, 0


def _train_step(network: Llama, optimizers: list, batch: Batch) -> float:
    loss = _loss(network, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def pretrain(
    tokenizer: Tokenizer,
    plan: Plan,
    checkpoint: Path,
    report: Callable[[str], None],
    save_every: int = 250,
) -> tuple[Llama, Progress]:
    """Trains to the end of the plan, from the checkpoint if there is one."""
    torch.manual_seed(plan.seed)
    torch.set_flush_denormal(True)
    network = Llama()
    optimizers = _optimizers(network, plan)
    progress = _load(checkpoint, network, optimizers) if checkpoint.exists() else Progress()
    rates = (plan.matrix_rate, plan.other_rate)
    before, cpu_before, recent = time.time(), time.process_time(), []
    for batch in _batches_from(tokenizer, plan, progress):
        if progress.step >= plan.steps:
            break
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * plan.rate_at(progress.step)
        network.precision.rounded = plan.is_rounded(progress.step)
        recent.append(_train_step(network, optimizers, batch))
        finishing = plan.is_finishing(progress.step)
        progress.step += 1
        progress.tokens += batch.size
        if plan.is_finishing(progress.step) != finishing:
            progress.pool, progress.place = progress.pool + 1, 0
        if progress.step % 25 == 0:
            now, cpu_now = time.time(), time.process_time()
            progress.seconds += now - before
            progress.cpu_seconds += cpu_now - cpu_before
            before, cpu_before = now, cpu_now
            report(_line(plan, progress, sum(recent) / len(recent)))
            recent.clear()
        if progress.step % save_every == 0 or progress.step == plan.steps:
            _save(checkpoint, network, optimizers, progress)
            report(f"held-out loss {held_out_loss(network, tokenizer, plan, finishing):.4f}")
    return network, progress


def _line(plan: Plan, progress: Progress, loss: float) -> str:
    rate = progress.tokens / progress.seconds
    left = progress.seconds / progress.step * (plan.steps - progress.step)
    return (
        f"step {progress.step} of {plan.steps}, loss {loss:.4f}, "
        f"{progress.tokens / 1e6:.2f} M tokens, {rate:.0f} tokens/s, {left / 60:.0f} min left"
    )


def steps_in(minutes: float, tokenizer: Tokenizer, seed: int) -> int:
    """How many steps this machine does in that time, measured on a few."""
    plan = Plan(1, seed)
    network = Llama()
    optimizers = _optimizers(network, plan)
    batches = pool_batches(tokenizer, plan, 0, finishing=False)[:8]
    for batch in batches[:3]:
        _train_step(network, optimizers, batch)
    before = time.time()
    for batch in batches[3:]:
        _train_step(network, optimizers, batch)
    return max(1, int(minutes * 60 * len(batches[3:]) / (time.time() - before)))
