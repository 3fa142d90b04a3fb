"""Chat over adapters that are swapped on one base: answers, kept prompts, memory, threads."""

import gc
import shutil
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
from adapter_models import attach_moved, difference, logits, write_base
from mlx.utils import tree_flatten

from dora_mlx import ChatModel, Sampling, UserError
from dora_mlx.adapters.adapter_folder import save_adapter
from dora_mlx.adapters.attach import attach
from dora_mlx.adapters.swapping import SwappableModel
from dora_mlx.loading import load_base

HELLO = [{"role": "user", "content": "Hello! Tell me a story."}]
SHORT = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "q8", bits=8)


@pytest.fixture(scope="module")
def adapters(base_dir, tmp_path_factory):
    """Folders of adapters of every kind, and the logits of each, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "dora": {"method": "dora"},
        "lora": {"method": "lora", "num_layers": 1, "target_modules": ("v_proj", "mlp.*")},
        "embedding": {"method": "dora", "target_modules": ("embed_tokens", "q_proj")},
    }
    wanted = {None: logits(load_base(base_dir).model)}
    for seed, (name, options) in enumerate(kinds.items()):
        model = load_base(base_dir).model
        spec = attach_moved(model, seed=seed, **options)
        (folder / name).mkdir()
        save_adapter(folder / name, model, spec)
        wanted[name] = logits(model)
    model = load_base(base_dir).model
    spec = attach(model, "full")
    model.update_modules({})
    moved = [(n, 1.1 * a + 0.02) for n, a in tree_flatten(model.trainable_parameters())]
    model.load_weights(moved)
    (folder / "full").mkdir()
    save_adapter(folder / "full", model, spec)
    wanted["full"] = logits(model.eval())
    return folder, wanted


@pytest.fixture
def swappable(base_dir, adapters):
    folder, wanted = adapters
    model = SwappableModel.load(str(base_dir))
    for name in wanted.keys() - {None}:
        model.add(name, model.read(folder / name))
    return model


def test_every_adapter_computes_what_it_did_alone_in_any_order(swappable, adapters):
    _, wanted = adapters
    names = [None, "dora", "full", "lora", "embedding", "full", None, "lora", "dora", None]
    for name in names:
        swappable.use(name)
        own = swappable.model(mx.random.randint(3, 2048, (2, 24), key=mx.random.key(7)))
        assert difference(wanted[name], own) < 1e-6, name
    assert difference(wanted["dora"], wanted["lora"]) > 0.01


def test_swapping_a_hundred_times_leaks_no_memory(swappable, adapters):
    folder, _ = adapters
    tokens = mx.zeros((1, 4), mx.int32)

    def swap(times):
        for number in range(times):
            for name in ("dora", "lora", "full", None):
                swappable.use(name)
                if number % 20 == 0:
                    mx.eval(swappable.model(tokens))
            if number % 20 == 0:
                swappable.add("dora", swappable.read(folder / "dora"))
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    before = swap(2)
    assert swap(100) <= before


def test_removed_adapter_gives_its_memory_back(base_dir, adapters):
    folder, _ = adapters
    model = SwappableModel.load(str(base_dir))
    stored = model.read(folder / "full")
    model.add("full", stored)
    model.use("full")
    gc.collect()
    before = mx.get_active_memory()
    size = sum(array.nbytes for array in stored.arrays.values())
    del stored
    model.remove("full")
    assert model.active is None
    gc.collect()
    assert mx.get_active_memory() <= before - size


def chat_with(base_dir, adapters):
    chat = ChatModel.load(str(base_dir))
    for name in ("dora", "lora"):
        chat.add_adapter(name, adapters[0] / name)
    return chat


def test_kept_prompts_change_no_answer(base_dir, adapters):
    # What was read before counts for the repetition penalty as well.
    sampling = replace(SHORT, temperature=0.8, seed=3, repetition_penalty=1.5)
    kept = chat_with(base_dir, adapters)
    messages, lengths = list(HELLO), []
    for turn in range(3):
        for name in ("dora", None, "lora"):
            lengths.append(reads(kept, messages, sampling, name))
            answer = "".join(kept.stream(messages, sampling, adapter=name))
            anew = chat_with(base_dir, adapters)
            assert answer == "".join(anew.stream(messages, sampling, adapter=name))
        messages += [{"role": "assistant", "content": answer}]
        messages += [{"role": "user", "content": f"And {turn}?"}]
    first, *later = lengths[::3]
    # Every later turn reads what is new in it alone.
    assert first > 8
    assert max(later) < 3 * first


def reads(chat, messages, sampling, name):
    """How many tokens the model has to read for an answer."""
    seen = []
    model = chat.base.model
    call = type(model).__call__

    def counting(self, inputs, *args, **kwargs):
        seen.append(inputs.shape[-1])
        return call(self, inputs, *args, **kwargs)

    type(model).__call__ = counting
    try:
        for _ in chat.stream(messages, replace(sampling, max_tokens=1), adapter=name):
            pass
    finally:
        type(model).__call__ = call
    return sum(seen) - 1


def replayed(monkeypatch, tokenizer, text):
    """Make every answer ``text``, token by token."""
    tokens = iter([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] * 9)
    draw = lambda _: mx.array([next(tokens)], mx.uint32)  # noqa: E731
    monkeypatch.setattr("dora_mlx.chat_model.make_sampler", lambda *_, **__: draw)


def test_characters_of_several_tokens_come_whole(base_dir, monkeypatch):
    chat = ChatModel.load(str(base_dir))
    text = "Ahoy \U0001f99c na\u00efve \u4f60\u597d\U0001f469\u200d\U0001f680!"
    tokenizer = chat.base.tokenizer
    assert len(tokenizer.encode(text, add_special_tokens=False)) > len(text)
    replayed(monkeypatch, tokenizer, text)
    pieces = list(chat.stream(HELLO, Sampling(max_tokens=200)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("lady",), "Once a "),
        (("a la", "Once a lady met"), "Once "),
        (("never said", "lady met an owl?"), "Once a lady met an owl."),
        (("owl.",), "Once a lady met an "),
    ],
)
def test_stop_texts_end_the_answer_across_tokens(base_dir, monkeypatch, stop, expected):
    chat = ChatModel.load(str(base_dir))
    replayed(monkeypatch, chat.base.tokenizer, "Once a lady met an owl.")
    assert "".join(chat.stream(HELLO, Sampling(max_tokens=200, stop=stop))) == expected


def test_a_closed_answer_frees_the_model_and_keeps_what_was_read(base_dir, adapters):
    chat = chat_with(base_dir, adapters)
    long = Sampling(max_tokens=50)
    answer = chat.stream(HELLO, long, adapter="dora")
    begun = next(answer)
    assert chat.active == "dora"
    for call in (
        lambda: next(chat.stream(HELLO)),
        lambda: chat.use(None),
        lambda: chat.add_adapter("more", adapters[0] / "lora"),
        lambda: chat.remove_adapter("dora"),
    ):
        with pytest.raises(UserError, match="answering already"):
            call()
    answer.close()
    assert chat.active is None
    assert reads(chat, HELLO, long, "dora") <= 2
    assert "".join(chat.stream(HELLO, long, adapter="dora")).startswith(begun)


def test_any_thread_may_ask_and_one_gets_the_answer(base_dir, adapters):
    chat = chat_with(base_dir, adapters)
    wanted = "".join(chat.stream(HELLO, SHORT, adapter="lora"))
    answers, refusals = [], []
    start = threading.Barrier(4)

    def ask():
        start.wait()
        try:
            answers.append("".join(chat.stream(HELLO, SHORT, adapter="lora")))
        except UserError as error:
            refusals.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(refusals) == 4
    assert answers
    assert set(answers) == {wanted}


def test_an_adapter_whose_file_is_replaced_answers_as_before(base_dir, adapters, tmp_path):
    # As a training in another process does to its run.
    shutil.copytree(adapters[0] / "dora", tmp_path / "run")
    chat = ChatModel.load(str(base_dir))
    chat.add_adapter("run", tmp_path / "run")
    chat.use("run")
    before = "".join(chat.stream(HELLO, SHORT))
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(adapters[0] / "lora", tmp_path / "run")
    assert "".join(chat.stream(HELLO, SHORT)) == before
    # Read again, it is the new one, and nothing that the old one read is used.
    chat.add_adapter("run", tmp_path / "run")
    assert reads(chat, HELLO, SHORT, "run") > 8
    again = chat_with(base_dir, adapters)
    wanted = "".join(again.stream(HELLO, SHORT, adapter="lora"))
    assert "".join(chat.stream(HELLO, SHORT, adapter="run")) == wanted


def test_unknown_adapters_and_bad_sampling_are_sentences(base_dir, adapters):
    chat = chat_with(base_dir, adapters)
    with pytest.raises(UserError, match="no adapter 'x' here; there are: dora, lora"):
        chat.use("x")
    with pytest.raises(UserError, match="no adapter 'x'"):
        next(chat.stream(HELLO, adapter="x"))
    with pytest.raises(UserError, match="holds no adapter"):
        chat.add_adapter("y", base_dir)
    with pytest.raises(UserError) as error:
        Sampling(temperature=-1, top_p=2, max_tokens=0)
    assert all(f"--{name}" in str(error.value) for name in ("temperature", "top-p", "max-tokens"))
    # More than there are tokens means all of them.
    assert list(chat.stream(HELLO, Sampling(max_tokens=2, temperature=1, top_k=10**6)))
