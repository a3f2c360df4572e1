"""How the models that ship with Fusebox are made: tokenizer, backbone, chat tuning, their evaluation and cards."""
