"""A data argument -> tokenized training and validation sets, with a report of each source."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dora_mlx.config import TrainConfig
from dora_mlx.data.cache import cache_key, content_fingerprint, is_worth_keeping, keep, load_kept
from dora_mlx.data.examples import ExampleSet
from dora_mlx.data.records import DataFiles, RecordReader, Source, Split, find_data
from dora_mlx.data.report import Report
from dora_mlx.data.rows import HUB
from dora_mlx.data.tokenized import SourceWriter, TokenizedSource
from dora_mlx.data.tokenizing import ExampleMaker
from dora_mlx.registry import samples_dir

SAMPLE = "pirate.jsonl"


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and validates on.

    ``seconds`` went into making ``tokens`` tokens of the sources that were not kept from before.
    """

    files: DataFiles
    train: ExampleSet
    valid: ExampleSet
    reports: list[Report]
    fingerprint: str
    tokens: int
    seconds: float


def prepare(config: TrainConfig, data: Source, tokenizer: Any) -> PreparedData:
    """Read, check, tokenize and split the data of a run.

    Args:
        config: The options of the run.
        data: A file, a folder or ``hub:owner/name``: ``config.data``, or what stands for none.
        tokenizer: The model's, as mlx-lm wraps it.

    Raises:
        UserError: For everything that is wrong with a source, in one report.
    """
    valid_data = None if config.valid_data is None else source_of(config.valid_data)
    files = find_data(data, valid_data)
    began = time.perf_counter()
    used = [source for source in (files.train, files.valid) if source is not None]
    digest = hashlib.sha256()
    sources = []
    for source in used:
        content = content_fingerprint(source)
        digest.update(content)
        tokenized = tokenize(config, source, tokenizer, content)
        if not config.skip_bad_rows:
            tokenized.report.raise_errors()
        sources.append(tokenized)
    train = sources[0]
    if len(sources) == 1:
        in_valid = _valid_side(train.digests, config)
        sets = train.part(~in_valid), train.part(in_valid)
    else:
        sets = train.all(), sources[1].all()
        _note_shared(train, sources[1])
    return PreparedData(
        files,
        *sets,
        [source.report for source in sources],
        digest.hexdigest(),
        sum(int(source.examples.lengths.sum(dtype=np.int64)) for source in sources),
        time.perf_counter() - began,
    )


def source_of(data: str) -> Source:
    """What a ``--data`` value names: a path, or a data set of the Hub as it is."""
    return data if data.startswith(HUB) else Path(data)


def training_source(config: TrainConfig) -> Source:
    """What a run reads its data from: what it names, or the sample."""
    return samples_dir() / SAMPLE if config.data is None else source_of(config.data)


def tokenize(
    config: TrainConfig, source: Source, tokenizer: Any, content: bytes | None = None
) -> TokenizedSource:
    """The tokenized rows of a source, from the cache where they are kept.

    Bad rows are left out and reported; whether that is an error is the caller's to say.
    """
    maker = ExampleMaker(
        tokenizer,
        config.max_seq_length,
        mask_prompt=config.mask_prompt,
        train_on=config.train_on,
        long_examples=config.long_examples,
    )
    if not is_worth_keeping(source):
        return _tokenize(config, source, maker, None)
    options = {
        name: getattr(config, name)
        for name in (
            "data_form", "columns", "max_seq_length", "mask_prompt", "train_on", "long_examples",
        )
    }  # fmt: skip
    content = content_fingerprint(source) if content is None else content
    key = cache_key(content, source, tokenizer, options)
    kept, trouble = load_kept(key)
    if kept is not None:
        return kept
    try:
        made = keep(key, lambda folder: _tokenize(config, source, maker, folder))
    except OSError as error:
        made = _tokenize(config, source, maker, None)
        trouble = f"the tokens could not be kept for the next time: {error}"
    if trouble:
        made.report.notice(trouble)
    return made


def _tokenize(
    config: TrainConfig, source: Source, maker: ExampleMaker, folder: Path | None
) -> TokenizedSource:
    reader = RecordReader(source, config.data_form, config.columns)
    writer = SourceWriter(folder)
    try:
        for record, examples, treated in maker.make(reader, reader.report):
            writer.append(record, examples, treated)
        return writer.finish(reader.report)
    finally:
        writer.close()


def _valid_side(digests: npt.NDArray[np.uint8], config: TrainConfig) -> npt.NDArray[np.bool_]:
    split = Split(config.valid_fraction, config.seed)
    return np.array([split.is_valid(digest.tobytes()) for digest in digests], np.bool_)


def _note_shared(train: TokenizedSource, valid: TokenizedSource) -> None:
    """Say how many validation rows are in the training data: their loss says little."""
    known = {digest.tobytes() for digest in train.digests}
    shared = sum(digest.tobytes() in known for digest in valid.digests)
    if shared:
        valid.report.notice(
            f"{shared:,} of its rows are also in the training data, so the validation loss "
            "will look better than it is"
        )
