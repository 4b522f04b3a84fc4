"""How a question becomes an answer: prompt, features, decoding, text stream, conversation, the opened model. NumPy alone."""
