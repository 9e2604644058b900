"""Questions and SFT examples from files to token ids (prompts, template, tokenizer), to microbatches (packing)."""
