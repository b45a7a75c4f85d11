"""Import the text tokenizer of a language model, or train a small byte-level BPE on the texts of filtered rows."""

from pipelines.common import FILTERED, TEXT_TOKENIZER, experiment, program
from unifork.config import TextTokenizerImport, load_card
from unifork.documents.prompts import INSTRUCTION, SYSTEM
from unifork.documents.text_tokenizer import FILES, import_text_tokenizer, texts_of, train_text_tokenizer
from unifork.weights import local_folder


def main(_: str) -> None:
    config = experiment().text_tokenizer
    if isinstance(config, TextTokenizerImport):
        tokenizer = import_text_tokenizer(local_folder(config.source, files=FILES), TEXT_TOKENIZER)
        print(f"{tokenizer.vocab_size} entries from {config.source} -> {TEXT_TOKENIZER}")
        return
    texts = [text for name in config.datasets for text in texts_of(FILTERED / name, load_card(name))]
    frame = [f"{SYSTEM} USER: \n{INSTRUCTION} ASSISTANT: "] * max(1, len(texts) // 10)
    tokenizer = train_text_tokenizer([*texts, *frame], config.vocab_size, TEXT_TOKENIZER)
    print(f"{tokenizer.vocab_size} entries from {len(texts)} texts -> {TEXT_TOKENIZER}")


if __name__ == "__main__":
    program("pipelines.text_tokenizer", lambda _: TEXT_TOKENIZER, main, None)
