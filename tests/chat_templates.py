"""Chat templates in the manner of eight families, written for the tests, and tokenizers."""

from functools import lru_cache

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts are kept in the last answer only, and an answer without any gets empty ones.
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns = m.content %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The system message stands in the last question, so it moves as the conversation goes on.
MISTRAL = (
    "{% set chat = messages[1:] if messages[0].role == 'system' else messages %}"
    "{{ bos_token }}{% for m in chat %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if messages[0].role == 'system' and m == (chat | selectattr('role', 'equalto', 'user') "
    "| list)[-1] %}{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Ends the whole text with the end of text, but only where no answer is asked for.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Marks answers itself, without their end of turn.
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt opens a thought that finished answers do not show.
OPEN_THOUGHT = CHATML.replace(
    "'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}"
)

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<bos>", "<eos>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>",
]  # fmt: skip
CORPUS = [
    "user assistant system model", "Hi there, how are you? I am well. Be kind.",
    "[INST] [/INST] <<SYS>> <</SYS>> <think> </think>", "What is one plus one? It is two.",
] * 20  # fmt: skip


@lru_cache(maxsize=2)
def trained_tokenizer(kind):
    """A byte-level BPE, or one in the manner of SentencePiece, with some hundred merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "sentencepiece" else None))
    alphabet = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [*map(chr, range(33, 127)), "\n", "\u2581"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 120, special_tokens=SPECIAL, initial_alphabet=alphabet
        ),
    )
    # Adds a beginning of text of its own, which a rendered template must not get.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()


def tokenizer_for(template, kind="bytes", bos=None, eos="<|im_end|>"):
    """A wrapped tokenizer with a template, as mlx-lm loads one."""
    inner = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer(kind)), bos_token=bos, eos_token=eos
    )
    inner.chat_template = template
    return TokenizerWrapper(inner, eos_token_ids=[inner.convert_tokens_to_ids(eos)])
