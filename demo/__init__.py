"""What a person meets first: a chatbot over a model folder. Only calls `runtime` and `convert`."""
