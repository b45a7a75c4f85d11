"""Import the text tokenizer of a language model, or train a small byte-level BPE on the texts of kept rows.

`text_tokenizer` of params.yaml (+ data/filtered/<set>, where it is trained) -> tokenizers/text
"""

from unifork.config import TextTokenizerImport, load_card, load_experiment
from unifork.documents.prompts import INSTRUCTION, SYSTEM
from unifork.documents.text_tokenizer import FILES, import_text_tokenizer, texts_of, train_text_tokenizer
from unifork.jobs import program
from unifork.layout import Layout
from unifork.shards.job import KeptRows
from unifork.weights import local_folder

LAYOUT = Layout()


def main(_: str) -> None:
    config = load_experiment().text_tokenizer
    if isinstance(config, TextTokenizerImport):
        tokenizer = import_text_tokenizer(local_folder(config.source, files=FILES), LAYOUT.text_tokenizer)
        print(f"{tokenizer.vocab_size} entries from {config.source} -> {LAYOUT.text_tokenizer}")
    else:
        kept = {name: KeptRows(LAYOUT, name, images=False) for name in config.datasets}
        texts = [text for name, rows in kept.items() for text in texts_of(rows, load_card(name))]
        frame = [f"{SYSTEM} USER: \n{INSTRUCTION} ASSISTANT: "] * max(1, len(texts) // 10)  # often, to become tokens
        tokenizer = train_text_tokenizer([*texts, *frame], config.vocab_size, LAYOUT.text_tokenizer)
        print(f"{tokenizer.vocab_size} entries from {len(texts)} texts -> {LAYOUT.text_tokenizer}")


if __name__ == "__main__":
    program(lambda _: LAYOUT.text_tokenizer, main)
