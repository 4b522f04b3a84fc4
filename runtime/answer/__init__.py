"""How a question becomes an answer: prompt, image features, decoding, text stream, conversation, the opened model. NumPy only."""
