"""Fixtures shared by the tests: small real models, never mocks."""

import json
import signal
from pathlib import Path

# Importing dora_mlx first gives MLX a fast BLAS in every test process.
import dora_mlx  # isort: skip  # noqa: F401
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dora_mlx.loading import LoadedModel, load_base
from dora_mlx.registry import models_dir
from dora_mlx.run_folder import RunFolder

# A shell ignores Ctrl-C for what it starts in the background, and programs that a test starts
# would inherit that and not be stopped.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def starter_path() -> Path:
    return models_dir() / "starter"


@pytest.fixture
def starter(starter_path: Path) -> LoadedModel:
    return load_base(starter_path)


@pytest.fixture(scope="session")
def tokenizer(starter_path: Path) -> TokenizerWrapper:
    return load_base(starter_path).tokenizer


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Forty short conversations, one of two turns."""
    path = tmp_path / "chat.jsonl"
    with open(path, "w") as file:
        for number in range(40):
            messages = [
                {"role": "user", "content": f"What is {number} plus 1?"},
                {"role": "assistant", "content": f"Arr! It be {number + 1}."},
            ]
            messages *= 2 if number % 8 == 0 else 1
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Where a run may go."""
    return RunFolder(tmp_path / "runs" / "a")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 60 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A folder for a model, with the tokenizer in it."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path
