"""What is on the disk: configuration, tokenizer and files of a model folder, and the settings that tune stores there."""
