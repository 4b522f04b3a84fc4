"""Jobs of many questions: requests are streamed, answered as fast as there is room, and stored so that a job can resume."""

DEFAULT_NEW_TOKENS = 512  # of an answer
CACHE_GB = 2  # of the KV cache of the rows that are being answered
