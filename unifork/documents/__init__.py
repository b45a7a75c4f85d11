"""From rows with codes to packed batches: prompts, tokenized documents, their order, packing and loading."""
