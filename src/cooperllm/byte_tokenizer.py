"""A tokeniser of single bytes, for the model that tests use: id = byte + 3 after padding, end and unknown, as ByT5 has it."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def byte_tokenizer() -> Tokenizer:
    """Builds it.

    Returns:
        The tokeniser; each text ends with `END`.

    Example:
        >>> byte_tokenizer().encode("ab").ids
        [100, 101, 1]
    """
    vocabulary = {PAD: 0, END: 1, UNKNOWN: 2} | {character: byte + 3 for byte, character in enumerate(_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, END, UNKNOWN)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, vocabulary[END])]
    )
    return tokenizer


def _characters() -> list[str]:
    """What the library's byte level writes for each byte: printable ones stand for themselves, the others follow from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
