"""The user's input: pictures, documents and videos from any source, and the tiles they are cut into."""
