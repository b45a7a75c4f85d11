"""From rows with codes to packed batches: prompts, tokenised documents, their order, packing and loading."""
