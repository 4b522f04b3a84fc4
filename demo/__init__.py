"""A chatbot and a search page over model folders, and two small models. Calls `runtime` and `convert` only."""
