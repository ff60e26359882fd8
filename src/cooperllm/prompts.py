"""What stands around a text and its completion, read off a Hugging Face tokeniser and its chat template."""

from typing import Any

from cooperllm.completion import Frame
from cooperllm.config import ModelConfig
from cooperllm.errors import ConfigError

TEXT, OTHER, COMPLETION = "COOPERLLM-TEXT", "COOPERLLM-OTHER", "COOPERLLM-COMPLETION"
"""Words that no chat template has, to find in what one makes of them."""


def frame_of(config: ModelConfig, tokenizer: Any) -> Frame:
    """Finds what a causal model is to read before a text, between text and completion, and behind it.

    A plain prompt begins with the token that the tokeniser begins every text with, and ends with its end of text. A chat template says all
    of this itself: it is asked once, here, so that devices need no template language.

    Args:
        config: Prompt, or that the chat template is to be used.
        tokenizer: Of the model.

    Returns:
        The frame.

    Raises:
        ConfigError: If a chat template is asked for and there is none, or it does more than put text and completion in place.

    Example:
        >>> from cooperllm.pretrained import tiny_llama
        >>> frame_of(ModelConfig(prompt="{text} ->"), tiny_llama(causal=True)[1])
        Frame(prompt='{text} ->', start=(), end=(1,))
    """
    if config.uses_chat_template:
        return _chat_frame(config, tokenizer)
    first = tokenizer("")["input_ids"][:1]
    start = tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
    end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return Frame(prompt=config.prompt, start=start, end=end)


def _chat_frame(config: ModelConfig, tokenizer: Any) -> Frame:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"model.uses_chat_template: found true, and no chat template in the tokeniser of {config.name!r}; give --prompt instead, or "
            "take an instruction-tuned model"
        )
    asked = [{"role": "user", "content": config.prompt.format(text=TEXT, text2=OTHER)}]
    answered = [*asked, {"role": "assistant", "content": COMPLETION}]
    prompt: str = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template(answered, tokenize=False)
    before, mark, ending = whole.partition(COMPLETION)
    has_all = asked[0]["content"] in prompt
    if not mark or not has_all or before != prompt:
        raise ConfigError(
            f"model.uses_chat_template: the chat template of {config.name!r} does more than put text and completion in place (before an "
            f"answer it writes {before[-40:]!r}, when it asks for one {prompt[-40:]!r}); give --prompt instead"
        )
    escaped = prompt.replace("{", "{{").replace("}", "}}").replace(TEXT, "{text}").replace(OTHER, "{text2}")
    return Frame(prompt=escaped, start=(), end=tuple(tokenizer(ending, add_special_tokens=False)["input_ids"]))
